"""T47: a worker opens the cards that are lent to it and no others, whatever it sets in its environment. By the kernel's own word.

No card is needed for that: the kernel asks about permission before it looks for a driver, so the node of a card that is not
there gives ENXIO to who may open it, and EPERM to who may not.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remoted.gpu.enforce import CARDS_MAJOR
from tests.fakes.nvml import Board, build_library
from tests.root.system_host import UNKNOWN, SystemHost, User, system_host

pytestmark = pytest.mark.root

BODY = """
import errno, json, os, sys
from remoted_client import remote, CpuLiveServerless, LiveServerless, GpuType
os.environ["CUDA_VISIBLE_DEVICES"] = "all of them"
def tried(folder):
    found = {}
    for name in sorted(os.listdir(folder)):
        try: os.close(os.open(os.path.join(folder, name), os.O_RDWR)); found[name] = "opened"
        except OSError as error: found[name] = errno.errorcode[error.errno]
    return found
cpu = remote(CpuLiveServerless(name="cpu"))(tried)
gpu = remote(LiveServerless(name="gpu", gpus=[GpuType.NVIDIA_A40], workersMax=1))(tried)
two = remote(LiveServerless(name="two", gpuCount=2, gpus=[GpuType.NVIDIA_RTX_A4000], workersMax=1))(tried)
print(json.dumps([function(sys.argv[1]).result().unwrap() for function in (cpu, gpu, two)]))
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Four cards and the driver's control node, everybody's to open, as distributions make them."""
    folder = Path("/dev") / f"remoted-{os.getpid()}"
    folder.mkdir(mode=0o755)
    try:
        for name, major, minor in [*((f"nvidia{n}", CARDS_MAJOR, n) for n in range(4)), ("nvidiactl", CARDS_MAJOR, 255), ("null", 1, 3)]:
            os.mknod(folder / name, stat.S_IFCHR | 0o666, os.makedev(major, minor))
            (folder / name).chmod(0o666)
        yield folder
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemHost]:
    with system_host() as made:
        library = build_library(made.prefix / "driver")
        (made.prefix / "etc/remoted/config.toml").write_text(f'{UNKNOWN}[gpu]\nnvml_library = "{library}"\n', encoding="utf-8")
        board = Board(made.prefix / "board")
        for name in ("NVIDIA RTX A4000", "NVIDIA A40", "NVIDIA RTX A4000", "NVIDIA H100"):
            board.add_gpu(name, memory_bytes=48 << 30)
        board.write()
        yield made.start(REMOTED_FAKE_BOARD=str(board.path))


@pytest.fixture
def alice(host: SystemHost) -> User:
    return host.user("alice", 60001)


def test_t47_only_the_cards_that_are_lent_can_be_opened(alice: User, nodes: Path) -> None:
    cpu, gpu, two = alice.run(BODY, str(nodes)).json
    refused = dict.fromkeys([f"nvidia{n}" for n in range(4)], "EPERM")
    others = {"null": "opened", "nvidiactl": "ENXIO"}

    assert cpu == {**refused, **others}
    assert gpu == {**refused, **others, "nvidia1": "ENXIO"}
    assert two == {**refused, **others, "nvidia0": "ENXIO", "nvidia2": "ENXIO"}
    started = {worker["start"] for worker in json.loads(alice.remotectl("workers", "--json").out)["workers"]}
    assert started == {"forked"}


HOOK = """
import os, sys
if sys.orig_argv[-1].isdigit():  # of a worker: the descriptor of its channel
    try: os.open("NODE", os.O_RDWR)
    except OSError as error: open(os.path.expanduser("~/found"), "a").write(f"{error.errno} ")
"""


def test_t47_a_worker_that_is_no_fork_has_the_same_rules_before_its_interpreter_starts(nodes: Path) -> None:
    """Whatever stands in a user's start-up files runs under them."""
    with system_host(UNKNOWN + "[limits]\nfork_servers_total = 0\n") as host:
        alice = host.start().user("alice", 60001)
        folder = alice.home / "start-up"
        folder.mkdir()
        hook = HOOK.replace("NODE", str(nodes / "nvidia0"))
        (folder / "sitecustomize.py").write_text(hook, encoding="utf-8")
        script = "import json, os, sys\nfrom remoted_client import remote, CpuLiveServerless\n@remote(CpuLiveServerless(name='cpu'))\ndef f(): return open(os.path.expanduser('~/found')).read()\nprint(json.dumps(f().result().unwrap()))"
        found = alice.run(script, PYTHONPATH=os.pathsep.join([alice.environ.get("PYTHONPATH", ""), str(folder)])).json

        assert set(found.split()) == {str(errno.EPERM)}
        checks: dict[str, Any] = {check["name"]: check for check in json.loads(alice.remotectl("doctor", "--json", check=False).out)["checks"]}
        assert checks["gpu access"]["ok"]
        assert not {"state", "disk", "descriptors", "database"} & {*checks}, "folders and loads of the host are no user's business"
        plain = alice.run(BODY.replace("(cpu, gpu, two)", "(cpu,)"), str(nodes)).json[0]
        assert {name: word for name, word in plain.items() if name.startswith("nvidia") and name != "nvidiactl"} == dict.fromkeys([f"nvidia{n}" for n in range(4)], "EPERM")


def test_t47_who_wants_manners_only_can_say_so(nodes: Path) -> None:
    with system_host(UNKNOWN + "[gpu]\nenforce = false\n") as host:
        alice = host.start().user("alice", 60001)
        found = alice.run(BODY.replace("(cpu, gpu, two)", "(cpu,)"), str(nodes)).json[0]

        assert found["nvidia0"] == "ENXIO"
        checks = {check["name"]: check for check in json.loads(host.user("root", 0).remotectl("doctor", "--json", check=False).out)["checks"]}
        assert "advisory" in checks["gpu access"]["detail"]
