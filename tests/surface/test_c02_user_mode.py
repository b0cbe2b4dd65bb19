"""C02 and MECHANISMS 7: the first call starts the caller's own daemon; it ends when idle; results expire."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.harness import Host, wait_until
from tests.surface.test_f01_to_f06_calls import HEAD

CALL = (
    HEAD
    + """
@remote(queue)
def f(x): return x + 1
out = f(1).result()
print(json.dumps([out.output, out.worker_id, out.id]))
"""
)


def daemon_pid(host: Host) -> int:
    return int((host.state / "remoted" / "lock").read_text(encoding="ascii"))


def test_c02_the_first_call_starts_a_daemon_with_one_line_and_the_second_is_silent(bare_host: Host) -> None:
    first = bare_host.run(CALL)
    pid = daemon_pid(bare_host)
    try:
        second = bare_host.run(CALL)
        assert first.json[0] == second.json[0] == 2
        assert first.json[1] == second.json[1], "the same warm worker"
        assert len(first.err.splitlines()) == 1
        assert str(pid) in first.err
        assert second.err == ""
        process = psutil.Process(pid)
        assert process.cwd() == "/"
        assert oct((bare_host.sockets).stat().st_mode & 0o777) == "0o700"
        assert oct((bare_host.state / "remoted" / "remoted.sqlite3").stat().st_mode & 0o777) == "0o600"
    finally:
        stop(pid)


def stop(pid: int) -> None:
    process = psutil.Process(pid)
    process.terminate()
    process.wait(15)


def test_c02_two_scripts_at_once_start_one_daemon(bare_host: Host) -> None:
    script = bare_host.write("both.py", CALL)
    processes = [bare_host.popen(script) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    try:
        assert [process.returncode for process in processes] == [0, 0, 0], outputs
        # The ones that found the lock taken say so and end.
        wait_until(lambda: sum(_is_daemon(process, bare_host.sockets) for process in psutil.process_iter()) == 1, 20)
    finally:
        stop(daemon_pid(bare_host))


def _is_daemon(process: psutil.Process, sockets: Path) -> bool:
    try:
        return "remoted" in process.cmdline() and process.environ().get("REMOTED_SOCKET") == str(sockets)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_c02_an_idle_daemon_ends_by_itself_and_leaves_nothing(bare_host: Host) -> None:
    bare_host.config.write_text("[limits]\nuser_mode_idle_seconds = 1\nhousekeeping_seconds = 0.2\n", encoding="utf-8")
    bare_host.start("--idle-exit").run(CALL)
    assert bare_host.process is not None
    assert bare_host.process.wait(20) == 0
    assert [path.name for path in bare_host.sockets.iterdir()] == ["lock"]
    wait_until(lambda: not any(_is_worker(process, bare_host.sockets) for process in psutil.process_iter()), 10)


def _is_worker(process: psutil.Process, sockets: Path) -> bool:
    try:
        environ = process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return "REMOTED_WORKER_ID" in environ and environ.get("REMOTED_SOCKET") == str(sockets)


def test_c02_without_the_daemons_packages_one_sentence_names_the_command(bare_host: Host) -> None:
    packages = bare_host.folder / "packages"
    subprocess.run([sys.executable, "-c", f"import shutil, cloudpickle, os; shutil.copytree(os.path.dirname(cloudpickle.__file__), {str(packages / 'cloudpickle')!r})"], check=True)
    script = bare_host.write("bare.py", CALL)
    process = subprocess.run(
        [sys.executable, "-S", str(script)],
        env={**bare_host.environ, "PYTHONPATH": f"{packages}:{bare_host.environ['PYTHONPATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 1
    assert "pip install '.[daemon]'" in process.stderr.splitlines()[-1]
    assert "DaemonUnreachable" in process.stderr.splitlines()[-1]


def test_f26_results_expire(bare_host: Host) -> None:
    bare_host.config.write_text("[limits]\nresult_seconds = 1\nhousekeeping_seconds = 0.2\n", encoding="utf-8")
    _, _, job = bare_host.start().run(CALL).json
    log = bare_host.state / "remoted" / "logs" / f"{job}.log"
    find = HEAD + "try: print(Job.from_id(sys.argv[1]).result().output)\nexcept SubmissionRefused as error: print(error.code)\n"
    wait_until(lambda: bare_host.run(find, job).out.strip() == "NOT_FOUND", 30)
    assert not log.exists()


def test_c02_the_client_and_the_daemon_agree_on_the_socket_directory() -> None:
    probe = "import os, remoted_client.daemon as c, remoted.paths as p; assert c.socket_directory() == str(p.socket_directory(dict(os.environ))), c.socket_directory()"
    for extra in ({"REMOTED_SOCKET": "/somewhere"}, {"XDG_RUNTIME_DIR": "/run/user/7"}, {}):
        environ = {"PATH": "/usr/bin", "HOME": "/", **extra}
        subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; {probe}"], env=environ, check=True)


def test_c02_two_homes_that_share_a_socket_folder_do_not_take_it_from_each_other(daemon: Host) -> None:
    environ = {**daemon.environ, "XDG_STATE_HOME": str(daemon.folder / "other"), "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, "-m", "remoted", "--user"], env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "another daemon of yours" in done.stderr
    assert daemon.run(CALL).json[0] == 2
