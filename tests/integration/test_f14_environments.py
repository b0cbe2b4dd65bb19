"""F14: dependencies= with real uv, real venvs and wheels from a folder; no test needs an index."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from remoted.config import EnvironmentSettings
from remoted.environments import BadRequirement, Environment, EnvironmentFailed, EnvironmentRequest, Environments, normalise
from remoted.environments.installer import uv_environment
from remoted.errors import SpawnError
from remoted.spawn import reaper
from remoted.spawn.helper import run_helper
from tests.fakes.wheels import Caller, install_editable, make_slow_source, make_source_project, make_wheel

UV = Path(sys.executable).parent / "uv"
BASE = os.path.realpath(sys.executable)
pytestmark = pytest.mark.skipif(not UV.exists(), reason="needs the daemon's uv beside its Python")


def ignore(data: bytes) -> None:
    """Output that nobody reads."""


@dataclass
class Runner:
    """The real helper, with a list of what it ran."""

    argvs: list[tuple[str, ...]] = field(default_factory=list)

    async def __call__(
        self, argv: Sequence[str], environ: Mapping[str, str], on_output: Callable[[bytes], None], deadline_seconds: float, /
    ) -> reaper.ExitStatus:
        self.argvs.append(tuple(argv))
        return await run_helper(argv, environ, on_output, deadline_seconds)

    @property
    def builds(self) -> int:
        return sum("venv" in argv for argv in self.argvs)


class FakeClock:
    """Wall time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def boot_id(self) -> str:
        return "boot"


class Bench:
    """A folder of wheels, a caller with some of them, and the environments under test."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        self.caller = Caller(UV, folder / "caller", BASE)
        self.environ = {"HOME": str(folder), "UV_CACHE_DIR": str(cache)}
        self.settings = EnvironmentSettings(wheel_folders=(str(self.wheels),), offline=True)
        self.runner = Runner()
        self.environments = self.restarted()

    def restarted(self) -> Environments:
        return Environments(self.folder / "environments", self.settings, self.runner, UV)

    def request(self, *requirements: str, isolated: bool = False) -> EnvironmentRequest:
        return EnvironmentRequest(os.getuid(), self.caller.python, requirements, isolated, accelerate_downloads=False)

    def ensure(self, *requirements: str, isolated: bool = False, environments: Environments | None = None) -> Environment:
        request = self.request(*requirements, isolated=isolated)
        return asyncio.run((environments or self.environments).ensure(request, ignore, self.environ))

    def leftovers(self) -> list[Path]:
        """Everything in the folder that is neither a complete environment nor bookkeeping."""
        folder = self.folder / "environments"
        found = [path for path in folder.iterdir() if path.name not in ("requests", "scratch")] + list((folder / "scratch").iterdir())
        return [path for path in found if not (path / "remoted.json").exists()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uv-cache")


@pytest.fixture
def bench(tmp_path: Path, cache: Path) -> Bench:
    return Bench(tmp_path, cache)


def run_inside(environment: Environment, code: str) -> str:
    done = subprocess.run([environment.python, "-c", code], check=True, capture_output=True, text=True, cwd="/")
    return done.stdout.strip()


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# -- building ----------------------------------------------------------------------------------------------


def test_a_requirement_becomes_importable(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0")

    built = bench.ensure("alpha==1.*")

    assert run_inside(built, "import alpha; print(alpha.version)") == "1.0"
    assert built.built_now
    assert built.seconds > 0


def test_two_concurrent_requests_share_one_build_and_both_see_its_output(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0")
    outputs = bytearray(), bytearray()

    async def both() -> list[Environment]:
        request = bench.request("alpha")
        return await asyncio.gather(*(bench.environments.ensure(request, output.extend, bench.environ) for output in outputs))

    first, second = asyncio.run(both())

    assert first == second
    assert bench.runner.builds == 1
    assert all(b"alpha==1.0" in output for output in outputs)


def test_differently_spelled_concurrent_requests_share_one_build(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha-beta", "1.0")

    async def both() -> list[Environment]:
        requests = bench.request("alpha-beta >= 1"), replace(bench.request("Alpha_Beta>=1"), accelerate_downloads=True)
        return await asyncio.gather(*(bench.environments.ensure(request, ignore, bench.environ) for request in requests))

    first, second = asyncio.run(both())

    assert first.key == second.key
    assert bench.runner.builds == 1
    assert second.variables == {"HF_XET_HIGH_PERFORMANCE": "1"}


def test_the_second_ensure_starts_no_process(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0")
    first = bench.ensure("alpha")
    ran = len(bench.runner.argvs)

    second = bench.ensure("alpha")

    assert (second.key, second.python, second.built_now) == (first.key, first.python, False)
    assert len(bench.runner.argvs) == ran


def test_a_restarted_daemon_neither_builds_nor_asks_anything(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0")
    first = bench.ensure("alpha")
    ran = len(bench.runner.argvs)

    second = bench.ensure("alpha", environments=bench.restarted())

    assert (second.python, second.built_now) == (first.python, False)
    assert len(bench.runner.argvs) == ran


def test_an_environment_that_was_deleted_by_hand_is_built_again(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0")
    first = bench.ensure("alpha")
    subprocess.run(["rm", "-r", str(Path(first.python).parent.parent)], check=True)

    second = bench.ensure("alpha")

    assert second.built_now
    assert run_inside(second, "import alpha; print(alpha.version)") == "1.0"


def test_extras_and_markers_are_honoured(bench: Bench) -> None:
    make_wheel(bench.wheels, "beta", "1.0")
    make_wheel(bench.wheels, "alpha", "1.0", extras={"more": ["beta"]})
    make_wheel(bench.wheels, "gamma", "1.0")

    built = bench.ensure("alpha[more]", "gamma ; python_version < '3'")

    assert run_inside(built, "import beta, importlib.util as u; print(beta.version, u.find_spec('gamma'))") == "1.0 None"


def test_offline_uses_no_index_even_when_the_caller_names_one(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0")
    indexes = {"UV_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "http://127.0.0.1:9/more", "UV_DEFAULT_INDEX": "http://127.0.0.1:9/d"}

    built = asyncio.run(bench.environments.ensure(bench.request("alpha"), ignore, bench.environ | indexes))

    assert built.built_now
    assert all("--offline" in argv for argv in bench.runner.argvs if argv[0] == str(UV))


# -- the caller's own packages -----------------------------------------------------------------------------


def test_the_callers_own_packages_are_importable_inside(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0")
    make_wheel(bench.wheels, "mine", "3.0")
    bench.caller.install(bench.wheels, "mine")

    built = bench.ensure("alpha")

    assert run_inside(built, "import mine, alpha; print(mine.version, alpha.version)") == "3.0 1.0"


def test_the_environment_comes_before_the_callers_packages(bench: Bench) -> None:
    make_wheel(bench.wheels, "mine", "1.0", modules={"both": "origin = 'caller'"})
    make_wheel(bench.wheels, "other", "1.0", modules={"both": "origin = 'environment'"})
    bench.caller.install(bench.wheels, "mine")

    built = bench.ensure("other")

    assert run_inside(built, "import both; print(both.origin)") == "environment"


def test_a_shared_package_keeps_the_callers_version_and_is_not_installed_again(bench: Bench) -> None:
    make_wheel(bench.wheels, "shared", "1.0")
    bench.caller.install(bench.wheels, "shared")
    make_wheel(bench.wheels, "shared", "2.0")
    make_wheel(bench.wheels, "alpha", "1.0", requires=["shared"])

    built = bench.ensure("alpha")

    assert run_inside(built, "import alpha, shared; print(shared.version, shared.__file__)").startswith(f"1.0 {bench.caller.folder}")


def test_a_version_that_no_index_has_any_more_is_no_obstacle(bench: Bench) -> None:
    make_wheel(bench.wheels, "shared", "1.0+cu121")
    bench.caller.install(bench.wheels, "shared")
    (bench.wheels / "shared-1.0+cu121-py3-none-any.whl").unlink()
    make_wheel(bench.wheels, "alpha", "1.0", requires=["shared>=1"])

    built = bench.ensure("alpha", "shared")

    assert run_inside(built, "import alpha, shared; print(shared.version)") == "1.0+cu121"


def test_an_editable_package_of_the_caller_satisfies_a_requirement(bench: Bench) -> None:
    project = make_source_project(bench.folder / "project", "mine", "1.5", "version = 'edited'")
    install_editable(bench.caller.site_packages, project, "mine")
    make_wheel(bench.wheels, "alpha", "1.0", requires=["mine>=1.2"])

    built = bench.ensure("alpha")

    assert run_inside(built, "import alpha, mine; print(mine.version)") == "edited"


def test_a_conflict_with_the_callers_package_names_both_and_the_way_out(bench: Bench) -> None:
    make_wheel(bench.wheels, "shared", "1.0")
    bench.caller.install(bench.wheels, "shared")
    make_wheel(bench.wheels, "shared", "2.0")
    make_wheel(bench.wheels, "alpha", "1.0", requires=["shared>=2"])

    with pytest.raises(EnvironmentFailed) as caught:
        bench.ensure("alpha")

    message = str(caught.value)
    assert "shared>=2" in message
    assert f"Your own environment ({bench.caller.folder}) has shared 1.0." in message
    assert "isolated=True" in message
    assert bench.leftovers() == []


def test_isolated_builds_what_conflicts_and_leaves_the_callers_packages_out(bench: Bench) -> None:
    make_wheel(bench.wheels, "shared", "1.0")
    make_wheel(bench.wheels, "mine", "1.0")
    bench.caller.install(bench.wheels, "shared", "mine")
    make_wheel(bench.wheels, "shared", "2.0")
    make_wheel(bench.wheels, "alpha", "1.0", requires=["shared>=2"])

    built = bench.ensure("alpha", isolated=True)

    assert run_inside(built, "import shared, importlib.util as u; print(shared.version, u.find_spec('mine'))") == "2.0 None"


def test_requirements_that_the_caller_has_already_make_an_empty_environment(bench: Bench) -> None:
    make_wheel(bench.wheels, "mine", "1.0")
    bench.caller.install(bench.wheels, "mine")

    built = bench.ensure("mine>=1")

    assert run_inside(built, "import mine; print(mine.version)") == "1.0"
    assert not any("install" in argv for argv in bench.runner.argvs)


def test_another_version_at_the_caller_leads_to_another_environment(bench: Bench) -> None:
    make_wheel(bench.wheels, "shared", "1.0")
    make_wheel(bench.wheels, "alpha", "1.0", requires=["shared"])
    bench.caller.install(bench.wheels, "shared==1.0")
    first = bench.ensure("alpha")
    make_wheel(bench.wheels, "shared", "2.0")
    bench.caller.install(bench.wheels, "shared==2.0")

    second = bench.ensure("alpha")

    assert second.built_now
    assert second.key != first.key
    assert run_inside(second, "import shared; print(shared.version)") == "2.0"


def test_an_unrelated_install_at_the_caller_keeps_the_environment(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0")
    make_wheel(bench.wheels, "unrelated", "1.0")
    first = bench.ensure("alpha")
    bench.caller.install(bench.wheels, "unrelated")

    second = bench.ensure("alpha")

    assert (second.python, second.built_now) == (first.python, False)
    assert run_inside(second, "import unrelated; print(unrelated.version)") == "1.0"


def test_callers_with_the_same_interpreter_but_other_venvs_do_not_share(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0")
    other = Caller(UV, bench.folder / "other", BASE)

    first = bench.ensure("alpha")
    second = asyncio.run(bench.environments.ensure(replace(bench.request("alpha"), executable=other.python), ignore, bench.environ))

    assert first.key != second.key


def test_a_caller_inside_an_environment_passes_everything_on(bench: Bench) -> None:
    """A nested call: the caller's executable is itself the Python of an environment."""
    for name in ("alpha", "beta", "mine"):
        make_wheel(bench.wheels, name, "1.0")
    bench.caller.install(bench.wheels, "mine")
    outer = bench.ensure("alpha")

    inner = asyncio.run(bench.environments.ensure(replace(bench.request("beta"), executable=outer.python), ignore, bench.environ))

    assert run_inside(inner, "import alpha, beta, mine; print('all')") == "all"


# -- failures ----------------------------------------------------------------------------------------------


def test_a_missing_package_is_named_and_the_log_comes_along(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0")

    with pytest.raises(EnvironmentFailed, match=r"cannot build the environment for alpha, nothere==7: .*nothere.* not found") as caught:
        bench.ensure("alpha", "nothere==7")

    assert "isolated" not in str(caught.value)
    assert "No solution found" in caught.value.log
    assert bench.leftovers() == []


def test_two_requirements_that_exclude_each_other_are_both_named(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0", requires=["beta<2"])
    make_wheel(bench.wheels, "beta", "2.0")

    with pytest.raises(EnvironmentFailed) as caught:
        bench.ensure("alpha", "beta>=2")

    assert "beta<2" in str(caught.value)
    assert "beta>=2" in str(caught.value)


def test_a_failed_build_is_not_remembered(bench: Bench) -> None:
    with pytest.raises(EnvironmentFailed):
        bench.ensure("alpha")
    make_wheel(bench.wheels, "alpha", "1.0")

    assert bench.ensure("alpha").built_now


def test_the_installers_failure_reaches_everybody_who_waits(bench: Bench) -> None:
    async def both() -> list[Environment | BaseException]:
        request = bench.request("nothere")
        return await asyncio.gather(*(bench.environments.ensure(request, ignore, bench.environ) for _ in range(2)), return_exceptions=True)

    assert [type(result) for result in asyncio.run(both())] == [EnvironmentFailed, EnvironmentFailed]


def test_an_interpreter_that_is_gone_is_named(bench: Bench) -> None:
    request = replace(bench.request("alpha"), executable=str(bench.folder / "gone" / "python"))

    with pytest.raises(EnvironmentFailed, match=r"cannot ask the interpreter .*/gone/python"):
        asyncio.run(bench.environments.ensure(request, ignore, bench.environ))


def test_an_interpreter_that_answers_nonsense_is_named(bench: Bench) -> None:
    request = replace(bench.request("alpha"), executable="/bin/echo")

    with pytest.raises(EnvironmentFailed, match="cannot ask the interpreter /bin/echo"):
        asyncio.run(bench.environments.ensure(request, ignore, bench.environ))


def test_a_missing_uv_is_said(bench: Bench) -> None:
    environments = Environments(bench.folder / "environments", bench.settings, bench.runner, bench.folder / "no-uv")

    with pytest.raises(EnvironmentFailed, match=r"cannot start .*no-uv.*install uv"):
        bench.ensure("alpha", environments=environments)


@pytest.mark.parametrize(
    "text",
    [
        "not a requirement!!",
        "",
        "-e /etc",
        "--index-url x",
        "-r/etc/passwd",
        "alpha --hash=sha256:00",
        "alpha==1 --config-settings=x=y",
        "alpha ; python_version > '3' --hash=sha256:00",
        "alpha ; python_version > '3 --hash=sha256:00'",
        "alpha\n--index-url x",
        "alpha\\",
        "alpha # comment",
        "alpha==${HOME}",
        "alpha @ https://example.invalid/alpha.whl",
        "git+https://example.invalid/alpha",
        "./alpha",
        "/tmp/alpha-1.0-py3-none-any.whl",
        "alpha;",
        "alpha; ",
        "alpha ; nonsense == '3'",
        "a" * 5000,
        "älpha",
    ],
)
def test_what_is_no_package_is_refused_before_anything_runs(tmp_path: Path, text: str) -> None:
    runner = Runner()
    environments = Environments(tmp_path, EnvironmentSettings(offline=True), runner, UV)
    request = EnvironmentRequest(os.getuid(), sys.executable, (text,), isolated=False, accelerate_downloads=False)

    with pytest.raises(BadRequirement, match=r"^cannot use the requirement "):
        asyncio.run(environments.ensure(request, ignore))

    assert runner.argvs == []
    assert list(tmp_path.glob("*-*")) == []


def test_requirements_have_one_spelling() -> None:
    marked = "y ;python_version<'3.12'  and  os_name == \"posix\""
    texts = [" Foo_Bar [B, a] >= 1 , <2 ", "foo-bar[a,b]<2,>=1", "x (==1.0)", marked, "numpy==2.*"]

    assert normalise(texts) == ("foo-bar[a,b]<2,>=1", "numpy==2.*", "x==1.0", 'y ; python_version < "3.12" and os_name == "posix"')


def test_only_variables_about_sources_reach_the_installer() -> None:
    caller = {
        "UV_INDEX_URL": "u",
        "PIP_CERT": "c",
        "PIP_REQUIRE_VIRTUALENV": "1",
        "HTTPS_PROXY": "p",
        "AWS_SECRET_ACCESS_KEY": "s",
        "UV_SYSTEM_PYTHON": "1",
        "PYTHONPATH": "/x",
        "VIRTUAL_ENV": "/v",
    }

    chosen = uv_environment(caller, accelerate_downloads=True)

    assert {"UV_INDEX_URL": "u", "SSL_CERT_FILE": "c", "HTTPS_PROXY": "p", "UV_CONCURRENT_DOWNLOADS": "128"}.items() <= chosen.items()
    assert not {"AWS_SECRET_ACCESS_KEY", "UV_SYSTEM_PYTHON", "PYTHONPATH", "VIRTUAL_ENV", "PIP_REQUIRE_VIRTUALENV"} & set(chosen)


# -- ends that nobody wished for ---------------------------------------------------------------------------


def slow_source(bench: Bench, name: str) -> Path:
    flag = bench.folder / "wait"
    flag.touch()
    make_slow_source(bench.wheels, name, "1.0", flag)
    return flag


def test_cancelling_the_only_caller_kills_the_installers_tree(bench: Bench) -> None:
    flag = slow_source(bench, "slowcancel")

    async def cancelled() -> int:
        task = asyncio.ensure_future(bench.environments.ensure(bench.request("slowcancel"), ignore, bench.environ))
        await until(lambda: flag.read_text() != "")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return int(flag.read_text())

    assert not is_running(asyncio.run(cancelled()))
    assert bench.leftovers() == []


def test_cancelling_one_of_two_callers_leaves_the_build_to_the_other(bench: Bench) -> None:
    flag = slow_source(bench, "slowtwo")

    async def one_leaves() -> Environment:
        request = bench.request("slowtwo")
        first, second = (asyncio.ensure_future(bench.environments.ensure(request, ignore, bench.environ)) for _ in range(2))
        await until(lambda: flag.read_text() != "")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        flag.unlink()
        return await second

    built = asyncio.run(one_leaves())

    assert run_inside(built, "import slowtwo; print(slowtwo.version)") == "1.0"
    assert bench.runner.builds == 1


def test_a_build_that_takes_too_long_fails_with_the_name_of_the_setting(bench: Bench) -> None:
    flag = slow_source(bench, "slowdeadline")
    bench.settings = bench.settings.model_copy(update={"build_deadline_seconds": 3.0})

    with pytest.raises(EnvironmentFailed, match=r"longer than 3 s .build_deadline_seconds"):
        bench.ensure("slowdeadline", environments=bench.restarted())

    assert not flag.read_text() or not is_running(int(flag.read_text()))
    assert bench.leftovers() == []


_DAEMON = """
import asyncio, sys
from pathlib import Path
from remoted.config import EnvironmentSettings
from remoted.environments import EnvironmentRequest, Environments
from remoted.spawn.helper import run_helper
folder, wheels, uv, uid, python, name, home, cache = sys.argv[1:]
settings = EnvironmentSettings(wheel_folders=(wheels,), offline=True)
request = EnvironmentRequest(int(uid), python, (name,), False, False)
environments = Environments(Path(folder), settings, run_helper, uv)
asyncio.run(environments.ensure(request, lambda data: None, {"HOME": home, "UV_CACHE_DIR": cache}))
"""


def test_what_a_killed_daemon_left_is_built_again_and_pruned(bench: Bench) -> None:
    flag = slow_source(bench, "slowkilled")
    arguments = [str(bench.folder / "environments"), str(bench.wheels), str(UV), str(os.getuid()), bench.caller.python, "slowkilled"]
    daemon = subprocess.Popen([sys.executable, "-c", _DAEMON, *arguments, bench.environ["HOME"], bench.environ["UV_CACHE_DIR"]])
    asyncio.run(until(lambda: flag.read_text() != ""))
    daemon.send_signal(signal.SIGKILL)
    daemon.wait()
    assert bench.leftovers() != []

    flag.unlink()  # its installer is still there and goes on in its own folder
    built = bench.ensure("slowkilled")
    asyncio.run(bench.environments.prune({built.key}, 0.0))

    assert built.built_now
    assert run_inside(built, "import slowkilled; print(slowkilled.version)") == "1.0"
    assert bench.leftovers() == []


# -- remotectl env -----------------------------------------------------------------------------------------


def test_list_tells_what_is_there(bench: Bench) -> None:
    make_wheel(bench.wheels, "alpha", "1.0")
    built = bench.ensure("alpha>=1")

    (entry,) = asyncio.run(bench.restarted().list())

    assert (entry.key, entry.requirements) == (built.key, ("alpha>=1",))
    assert entry.size_bytes > 0


def test_prune_removes_what_is_old_and_not_kept(bench: Bench) -> None:
    clock = FakeClock()
    environments = Environments(bench.folder / "environments", bench.settings, bench.runner, UV, clock)  # type: ignore[arg-type]
    for name in ("kept", "old", "used"):
        make_wheel(bench.wheels, name, "1.0")
    kept, old, used = (bench.ensure(name, environments=environments) for name in ("kept", "old", "used"))
    clock.now += 100.0
    bench.ensure("used", environments=environments)

    removed = asyncio.run(environments.prune({kept.key}, unused_seconds=50.0))

    assert removed == (old.key,)
    assert {entry.key for entry in asyncio.run(environments.list())} == {kept.key, used.key}
    assert not Path(old.python).exists()
    assert bench.ensure("old", environments=environments).built_now


# -- the helper itself -------------------------------------------------------------------------------------


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def collect(argv: Sequence[str], deadline_seconds: float = 20.0) -> tuple[reaper.ExitStatus, bytes]:
    output = bytearray()

    async def collected() -> reaper.ExitStatus:
        return await run_helper(argv, {"PATH": "/usr/bin:/bin"}, output.extend, deadline_seconds)

    return asyncio.run(collected()), bytes(output)


def test_the_helper_passes_on_all_output_and_the_exit_code() -> None:
    before = open_descriptors()

    status, output = collect(("/bin/sh", "-c", "head -c 3000000 /dev/zero; echo end >&2; exit 3"))

    assert status.code == 3
    assert len(output) == 3_000_004
    assert output.endswith(b"end\n")
    assert open_descriptors() == before


def test_the_helper_kills_the_tree_at_the_deadline() -> None:
    before = open_descriptors()
    pids = bytearray()

    async def too_long() -> None:
        script = "sleep 1000 & echo $!; setsid sleep 1000 & echo $!; wait"
        await run_helper(("/bin/sh", "-c", script), {"PATH": "/usr/bin:/bin"}, pids.extend, 0.7)

    with pytest.raises(TimeoutError, match=r"did not end within 0\.7 s"):
        asyncio.run(too_long())

    assert len(pids.split()) == 2
    assert not any(is_running(int(pid)) for pid in pids.split())
    assert open_descriptors() == before


_SUBREAPER = """
import asyncio, psutil
from remoted.spawn import reaper
from remoted.spawn.helper import run_helper
reaper.become_subreaper()
script = "sleep 1000 & setsid sleep 1000 & (setsid sleep 1000 &) ; (sleep 1000 &) ; "
for end, limit in (("wait", 0.7), ("exit 0", 20.0)):
    try:
        asyncio.run(run_helper(("/bin/sh", "-c", script + end), {"PATH": "/usr/bin:/bin"}, lambda data: None, limit))
    except TimeoutError:
        pass
    print(psutil.Process().children(recursive=True))
"""


def test_a_subreaper_is_left_with_neither_orphans_nor_zombies() -> None:
    done = subprocess.run([sys.executable, "-c", _SUBREAPER], check=True, capture_output=True, text=True)

    assert done.stdout.split() == ["[]", "[]"]


def test_the_helper_does_not_wait_for_what_was_left_behind_and_kills_it() -> None:
    status, output = collect(("/bin/sh", "-c", "sleep 1000 & echo $!; exit 0"))

    assert status.code == 0
    assert not is_running(int(output))


def test_the_helper_that_cannot_start_says_why() -> None:
    before = open_descriptors()

    with pytest.raises(SpawnError, match=r"cannot start /nowhere/uv: .*No such file"):
        collect(("/nowhere/uv",))

    assert open_descriptors() == before


def test_a_helper_cancelled_while_it_starts_does_not_survive() -> None:
    def is_over() -> bool:
        return not psutil.Process().children() and not any(thread.name.startswith("helper") for thread in threading.enumerate())

    async def at_once() -> None:
        task = asyncio.ensure_future(run_helper(("/bin/sleep", "1000"), {}, ignore, 20.0))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(is_over)

    asyncio.run(at_once())


def test_a_failing_listener_ends_the_helper() -> None:
    def fail(data: bytes) -> None:
        raise RuntimeError("no more")

    async def failing() -> None:
        await run_helper(("/bin/sh", "-c", "echo x; sleep 1000"), {"PATH": "/usr/bin:/bin"}, fail, 20.0)

    with pytest.raises(RuntimeError, match="no more"):
        asyncio.run(failing())
