"""SURFACE F28: every Python block of the Flash document runs with only its import line changed, and its functions work.

Each block has a ``Case``: what stands before it (names that the document takes from an earlier block), the questions
asked after it, and the answers. Models and networks are stand-ins: small real modules, on the callers' path or, where
a block names them as ``dependencies``, as wheels that are really installed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.nvml import Board, build_library
from tests.fakes.nvml.board import GIB
from tests.fakes.wheels import make_wheel
from tests.harness import ROOT, Host, Run, host

HERE = Path(__file__).parent
DOCUMENT = (HERE / "documents" / "flash-sdk-reference.md").read_text(encoding="utf-8")
RUNNER = HERE / "documents" / "run_block.py"
STANDINS = HERE / "standins"
BLOCKS = [textwrap.dedent(found[2]) for found in re.finditer(r"^( *)```python\n(.*?)^\1```", DOCUMENT, re.MULTILINE | re.DOTALL)]
#: The cards that the document names, so that every group can be served.
CARDS = (
    ("NVIDIA RTX A5000", 24, (8, 6)),
    ("NVIDIA GeForce RTX 4090", 24, (8, 9)),
    ("NVIDIA A100-SXM4-80GB", 80, (8, 0)),
    ("NVIDIA A100-SXM4-80GB", 80, (8, 0)),
    ("NVIDIA H200", 141, (9, 0)),
    ("NVIDIA H200", 141, (9, 0)),
)
WHEELS = {"torch": "2.1.0", "transformers": "4.30.2", "diffusers": "0.27.0"}

#: What every reader of the document has imported by then.
NAMES = """
import os
from remoted_client import remote, LiveServerless, CpuLiveServerless, ServerlessEndpoint, CpuServerlessEndpoint
from remoted_client import LiveLoadBalancer, CpuLiveLoadBalancer, LoadBalancerSlsResource, CpuLoadBalancerSlsResource
from remoted_client import GpuGroup, CpuInstanceType, NetworkVolume, PodTemplate, CudaVersion, DataCenter, SubmissionRefused
def cards(config, **more):
    "How many GPUs a call on this config sees."
    return remote(config, **more)(lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))().result()
async def code(handle):
    "The code with which the daemon refuses the call."
    try: await handle
    except SubmissionRefused as error: return error.code
"""
CONFIG = 'config = LiveServerless(name="doc", gpus=[GpuGroup.ANY])\n'


@dataclass(frozen=True)
class Case:
    """One block: ``prelude`` before it, then what the questions (expressions) must answer."""

    slug: str
    answers: dict[str, Any]
    prelude: str = ""
    out: str = ""
    environ: dict[str, str] = field(default_factory=dict)
    #: False: torch and the like are there only where the block's ``dependencies`` bring them.
    standins: bool = True
    #: Functions inside of others, by name: who calls them.
    inner: dict[str, str] = field(default_factory=dict)
    #: Why lines that begin with "- " are left out: they are prose, not Python.
    prose: bool = False


OUT = "(await {}).output"
SUCCESS = {"result": "success"}

CASES: dict[int, Case] = {
    0: Case("exports", {"[GpuGroup.__name__, remote.__name__, NetworkVolume.__name__]": ["GpuGroup", "remote", "NetworkVolume"]}),
    1: Case(
        "signature",
        {
            "remote(None)": None,
            "set(inspect.signature(remote).parameters) <= set(inspect.signature(ours).parameters)": True,
            "[p.default for p in inspect.signature(remote).parameters.values()][1:] == [inspect.signature(ours).parameters[n].default for n in list(inspect.signature(remote).parameters)[1:]]": True,
        },
        "from typing import Callable, Optional, Union\nours = remote\n",
    ),
    2: Case("always_awaitable", {"result.output": SUCCESS, OUT.format("my_function({})"): SUCCESS}, CONFIG),
    3: Case(
        "common_parameters",
        {"[name for name, value in vars(ResourceConfig).items() if name[0] != '_' and value is not None and getattr(LiveServerless('x'), name) != value]": []},
        "from typing import Optional\n",
    ),
    4: Case(
        "live_serverless",
        {
            OUT.format("inference({})"): {"result": "output"},
            "'site-packages/torch.py' in remote(gpu_config, dependencies=['torch>=2.0.0', 'transformers>=4.30.0'])(lambda: __import__('torch').__file__)().result().output": True,
        },
        out="Result: {'result': 'output'}\n",
        standins=False,
    ),
    5: Case("cpu_live_serverless", {OUT.format("process_data(['a', 'b'])"): {"processed": 2}}, inner={"process_item": "process_data"}),
    6: Case("serverless_endpoint", {OUT.format("production_inference({})"): {"status": "success"}}),
    7: Case("live_load_balancer", {"await real_time_inference({})": {"prediction": 0.95}}),
    8: Case("load_balancer_sls_resource", {"await production_realtime({})": {"status": "processed"}}),
    9: Case("gpu_groups", {"len(GpuGroup.all()) >= 9": True}),
    10: Case("two_gpus", {"cards(config).output": 2}),
    11: Case("cpu_instance_types", {"[size.vcpus for size in CpuInstanceType][:5]": [2, 4, 8, 16, 32]}),
    12: Case("cpu_count", {"config.cpuCount": 8, "remote(config)(lambda: 1)().result().output": 1}),
    13: Case(
        "wrong_external_references_work_here",
        {OUT.format("inference('p')"): {"result": "..."}, "load_model().path": "model.pt"},
        CONFIG,
    ),
    14: Case(
        "correct_everything_inside",
        {OUT.format("inference('hi')"): {"result": "hi by model.pt on cuda"}},
        CONFIG,
        inner={"load_model": "inference"},
    ),
    15: Case("decorator_parameters", {OUT.format("my_function({})"): {"status": "ok"}}),
    16: Case(
        "async_and_sync_both_work_here",
        {OUT.format("my_function__1({'a': 1})"): [{"a": 1}], OUT.format("my_function__2({'a': 1})"): {"a": 1}},
        CONFIG + "async def some_async_operation(data): return [data]\n",
    ),
    17: Case(
        "serializable_arguments",
        {OUT.format("process(os.environ['REMOTED_BLOCK'])"): {"first": "# \u2705 Serializable types"}},
        CONFIG + "def process_file(f): return {'first': f.readline().strip()}\n",
        prose=True,
    ),
    18: Case(
        "imports_inside_and_at_module_level",
        {OUT.format("inference__1('hi')"): {"output": "text-generation: hi"}, OUT.format("inference__2('ho')"): {"output": "text-generation: ho"}},
        CONFIG,
    ),
    19: Case(
        "return_types",
        {
            "[(await my_function__1({'a': 1})).output[key] for key in ('status', 'result', 'values')]": ["success", ["a"], [1, 2, 3]],
            "isinstance((await my_function__2({})).output, datetime)": True,
        },
        CONFIG + "from datetime import datetime\ndef perform_computation(data): return list(data)\n",
    ),
    20: Case("python_dependencies", {OUT.format("my_function({})"): {"status": "ok"}}, CONFIG, standins=False),
    21: Case("system_dependencies", {OUT.format("process_video('u')"): {"ffmpeg": "available"}}, CONFIG),
    22: Case("accelerate_downloads", {OUT.format("inference('p')"): {"status": "ok"}}, CONFIG, standins=False),
    23: Case(
        "job_output",
        {"set(JobOutput.__annotations__) <= {field.name for field in dataclasses.fields(ours)}": True},
        "import dataclasses\nfrom typing import Any, Optional\nfrom remoted_client import JobOutput as ours\n",
    ),
    24: Case(
        "queue_based_errors",
        {"job_output.output": SUCCESS, "(await my_job({'invalid': True})).error": "ValueError: Invalid input"},
    ),
    25: Case("load_balanced_errors", {"await inference({})": SUCCESS}, out="Error: Invalid input\n"),
    26: Case(
        "exceptions_in_remote_functions",
        {
            OUT.format("robust_function({'id': 1})"): {"status": "success", "data": {"url": "https://api.example.com", "got": 1}},
            "(await robust_function({'fail': 'ValueError'})).error": "ValueError: Invalid input: the stand-in refuses",
            "[(await robust_function({'fail': 'OSError'})).error, type((await robust_function({'fail': 'OSError'})).exception.__cause__).__name__]": [
                "RuntimeError: Processing failed: the stand-in refuses",
                "OSError",
            ],
        },
        CONFIG,
        inner={"external_api_call": "robust_function"},
    ),
    27: Case(
        "large_arguments_and_references",
        {
            OUT.format("process_image__1(np.arange(5))"): {"objects": 10},
            OUT.format("process_image__2('http://x/')"): {"objects": {"model": "detector.pt", "seen": 9, "threshold": None}},
        },
        CONFIG + "import numpy as np\ndef your_detection_model(array): return int(array.sum())\n",
    ),
    28: Case(
        "identical_arguments_run_again",
        {"[result1.output, result2.output, result3.output]": [[1, "data"], [2, "data"], [3, "different"]]},
        CONFIG + "count = 0\n@remote(config)\ndef my_function(data):\n    global count\n    count += 1\n    return [count, data['large']]\n",
    ),
    29: Case("local_mode", {"[result.output, result.worker_id]": [{"status": "success"}, "local"]}, CONFIG),
    30: Case("volumes_are_refused_in_this_version", {"await code(inference('p'))": "NOT_SUPPORTED", "config.networkVolumeId == volume.id": True}),
    31: Case("pod_template", {"config.podTemplate.memory_gb": 40, "cards(config).output": 1}),
    32: Case(
        "environment_variables",
        {
            OUT.format("configurable_function({})"): {"size": "large", "log": "DEBUG"},
            "remote(config, env={'API_KEY': None})(lambda: os.environ['API_KEY'])().result().output": "k3y",
        },
        CONFIG,
        environ={"API_KEY": "k3y"},
    ),
    33: Case(
        "class_inside_a_function",
        {OUT.format("run_model({'a': 1})"): {"prediction": {"model": "pretrained_model.pt", "data": {"a": 1}}}},
        CONFIG,
        inner={"__init__": "MyModel()", "predict": "run_model"},
    ),
    34: Case(
        "pydantic_validation",
        {
            OUT.format("inference(InferenceRequest(image_url='u', threshold=0.25))"): {"result": {"model": "detector.pt", "seen": 12, "threshold": 0.25}},
            "refused(lambda: InferenceRequest(image_url='u', threshold=2))": "ValidationError",
        },
        CONFIG + "def refused(make):\n    try: make()\n    except Exception as error: return type(error).__name__\n",
        inner={"validate_threshold": "InferenceRequest()", "download_image": "inference"},
    ),
    35: Case(
        "retries",
        {
            "(lambda out: [out.output, out.attempts])(await unreliable_operation({'flaky': here + '1', 'times': 2, 'id': 5}))": [
                {"result": {"url": "https://api.example.com", "got": 5}},
                3,
            ],
            "await with_manual_retry({'flaky': here + '2', 'times': 1, 'id': 6})": {"url": "https://api.example.com", "got": 6},
        },
        "here = os.environ['REMOTED_BLOCK']\n",
        inner={"flaky_external_api": "unreliable_operation", "external_api": "with_manual_retry"},
    ),
    36: Case(
        "conditional_execution",
        {
            OUT.format("smart_processing({})"): {"status": "skipped"},
            OUT.format("smart_processing({'require_processing': True})"): {"status": "processed", "result": {"computation": "done"}},
        },
        CONFIG.replace("doc", "slow"),
        inner={"heavy_computation": "smart_processing"},
    ),
    37: Case(
        "async_iteration",
        {OUT.format("batch_process(['a', 'b'])"): {"processed": 2, "results": ["processed_a", "processed_b"]}},
        CONFIG,
        inner={"process_item": "run_batch", "run_batch": "batch_process"},
    ),
    38: Case("cost_optimization", {"[config.name, cards(config).output]": ["right_sized", 1]}),
    39: Case(
        "performance",
        {
            OUT.format("process_dataset__1([{'a': 1}])"): {"rows": 1},
            OUT.format("process_dataset__2('s3://b')"): {"from": ["client of s3", "s3://b"]},
            OUT.format("batch_inference(['u', 'v'])"): {"results": [{"model": "model.pt", "seen": 12, "threshold": None}] * 2},
        },
        CONFIG + "def process_data(data): return {'rows': len(data)}\ndef process_from_s3(s3, path): return {'from': [s3, path]}\n",
        inner={"download_image": "batch_inference"},
    ),
    40: Case("testing_remotely", {"(lambda out: [out.output, out.worker_id == 'local'])(await my_function({}))": [{"status": "ok"}, False]}),
    41: Case(
        "monitoring",
        {
            OUT.format("observable_function({'id': 1})"): {"done": 1},
            "(lambda out: [out.error, 'Processing failed' in out.stderr, 'KeyError' in out.stderr])(await observable_function({}))": ["KeyError: 'id'", True, True],
        },
        CONFIG + "async def process(data): return {'done': data['id']}\n",
    ),
    42: Case(
        "gotcha_external_scope",
        {OUT.format("inference__1({})"): None, OUT.format("inference__2({})"): None},
        CONFIG + "def load_model(): return 'outside'\n",
        inner={"load_model": "inference"},
    ),
    43: Case(
        "gotcha_forgotten_await",
        {"result.output": {"a": 1}},
        CONFIG + "data = {'a': 1}\n@remote(config)\ndef my_remote_function(data): return data\n",
    ),
    44: Case(
        "gotcha_mutable_defaults",
        {
            "[(await process__1()).output, (await process__1()).output]": [["new"], ["new", "new"]],
            "[(await process__2()).output, (await process__2()).output]": [["new"], ["new"]],
        },
        CONFIG,
    ),
    45: Case(
        "gotcha_undeclared_dependency",
        {"[(await my_function__1({})).error, (await my_function__2({})).error]": [None, None]},
        CONFIG,
    ),
    46: Case("gotcha_error_models", {"[job.output, await lb_job({'valid': True})]": [{"result": "ok"}, {"result": "ok"}]}, out="Failed: Invalid input\n"),
    47: Case("gotcha_volume_delays_refused_in_this_version", {"await code(remote(config)(lambda: 1)())": "NOT_SUPPORTED"}),
}
#: The same block under other circumstances.
VARIANTS = {
    40: Case(
        "testing_locally",
        {"(lambda out: [out.output, out.worker_id])(await my_function({}))": [{"status": "ok"}, "local"]},
        environ={"LOCAL_TEST": "True"},
    ),
}
#: Ten seconds of ``asyncio.sleep`` in the document: begun first, looked at when its turn comes.
SLOW = 36


class Desk:
    """A host with the document's cards, and its blocks as scripts."""

    def __init__(self, made: Host) -> None:
        self._host = made
        self._slow = self._popen(SLOW, CASES[SLOW])

    def run(self, number: int, case: Case) -> Run:
        process = self._slow if number == SLOW else self._popen(number, case)
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"block {number} hangs\n{process.communicate()}\n{self._host.log()}") from None
        assert process.returncode == 0, f"block {number}:\n{out}\n{err}\n--- daemon\n{self._host.log()[-3000:]}"
        return Run(process.returncode, out, err)

    def close(self) -> None:
        self._slow.kill()
        self._slow.communicate()

    def _popen(self, number: int, case: Case) -> subprocess.Popen[str]:
        prelude = self._host.write(f"prelude_{number}_{case.slug}.py", NAMES + case.prelude)
        block = self._host.write(f"block_{number}_{case.slug}.py", block_source(number))
        path = self._host.environ["PYTHONPATH"] + (f"{os.pathsep}{STANDINS}" if case.standins else "")
        environ = {
            "PYTHONPATH": path,
            "PYTHONWARNINGS": "error,ignore::DeprecationWarning,ignore:system_dependencies",  # pydantic says that ``validator`` is old
            "PATH": f"{STANDINS / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "REMOTED_BLOCK": str(block),
            **case.environ,
        }
        return self._host.popen(RUNNER, str(prelude), str(block), json.dumps(list(case.answers)), **environ)


def block_source(number: int) -> str:
    """The block with its import line changed, and nothing else; lines of prose become comments."""
    text = BLOCKS[number].replace("from tetra_rp import", "from remoted_client import")
    return re.sub(r"^- ", "# - ", text, flags=re.MULTILINE) if CASES[number].prose else text


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    driver = build_library(tmp_path_factory.mktemp("driver"))
    wheels = tmp_path_factory.mktemp("wheels")
    for name, version in WHEELS.items():
        make_wheel(wheels, name, version, {name: (STANDINS / f"{name}.py").read_text(encoding="utf-8")})
    settings = f'[gpu]\nnvml_library = "{driver}"\npoll_seconds = 0.2\n[environments]\nwheel_folders = ["{wheels}"]\noffline = true\n'
    with host(settings) as made:
        board = Board(made.folder / "board")
        for name, gib, capability in CARDS:
            board.add_gpu(name, memory_bytes=gib * GIB, compute_capability=capability)
        board.write()
        opened = Desk(made.start(REMOTED_FAKE_BOARD=str(board.path)))
        try:
            yield opened
        finally:
            opened.close()


def check(desk: Desk, number: int, case: Case) -> None:
    result = desk.run(number, case)
    assert result.json == list(case.answers.values())
    assert case.out in result.out


def _add_tests() -> None:
    """One test a block, named after it."""
    for table in (CASES, VARIANTS):
        for number, case in table.items():
            _add_test(number, case)


def _add_test(number: int, case: Case) -> None:
    def test(desk: Desk) -> None:
        check(desk, number, case)

    test.__doc__ = f"Block {number}: {BLOCKS[number].strip().splitlines()[0]}"
    globals()[f"test_f28_block_{number:02}_{case.slug}"] = test


_add_tests()


def test_f28_every_block_has_a_case_and_only_its_import_line_is_changed() -> None:
    assert set(CASES) == set(range(len(BLOCKS)))
    for number, text in enumerate(BLOCKS):
        changed = [old for old, new in zip(text.splitlines(), block_source(number).splitlines(), strict=True) if old != new]
        assert all(line.startswith("from tetra_rp import") or (CASES[number].prose and line.startswith("- ")) for line in changed)


def test_f28_every_function_of_every_block_is_called() -> None:
    for number, case in CASES.items():
        asked = " ".join(case.answers)
        for name, count in _functions(block_source(number)).items():
            names = [f"{name}__{place}" for place in range(1, count + 1)] if count > 1 else [name]
            missing = [one for one in names if f"{one}(" not in asked and name not in case.inner and f"await {one}(" not in BLOCKS[number]]
            assert not missing, f"block {number} defines {missing} and nobody calls it"


def _functions(text: str) -> dict[str, int]:
    """How often each name is defined at the top level; functions inside of others once."""
    tree = compile(text, "block", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = {node.name: 1 for node in ast.walk(tree) if isinstance(node, kinds)}
    top = [node.name for node in tree.body if isinstance(node, kinds)]
    return {name: max(1, top.count(name)) for name in found}


def test_f28_the_copy_of_the_document_is_the_seed() -> None:
    seed = ROOT.parent / "shared" / "seeds" / "flash-sdk-reference.md"
    if not seed.exists():
        pytest.skip("the seed is not on this machine")
    assert seed.read_text(encoding="utf-8") == DOCUMENT
