"""C04: ``remotectl`` against a real daemon with real workers, and against none."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from remoted import paths
from remoted.cli import text, transport
from tests.fakes.nvml.board import GIB, Board, build_library
from tests.harness import Host, host

MAIN = "from remoted.cli import main; main()"
PATIENCE_SECONDS = 60.0
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NEEDS ROOT: two users")


class Terminal:
    """Runs remotectl as the user of one host."""

    def __init__(self, host: Host) -> None:
        self.folder = host.project
        self.environ = host.environ

    def start(self, *arguments: str, program: str = MAIN) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", program, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environ, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of one command."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, out.decode(), err.decode()

    def on_a_screen(self, *arguments: str) -> tuple[int, list[str]]:
        """(exit code, lines) of one command whose output, a little, goes to a terminal."""
        ours, theirs = pty.openpty()
        command = [sys.executable, "-c", MAIN, *arguments]
        process = subprocess.Popen(command, env=self.environ, cwd=self.folder, stdin=theirs, stdout=theirs, stderr=theirs)
        try:
            os.close(theirs)
            code = process.wait(PATIENCE_SECONDS)
            return code, os.read(ours, 65536).decode().splitlines()
        finally:
            os.close(ours)

    def json(self, *arguments: str) -> Any:
        code, out, err = self(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    def job(self, *command: str, name: str = "test") -> str:
        """A detached job; its id."""
        code, out, err = self("run", "--detach", "--name", name, "--", *command)
        assert code == 0, err
        return out.strip()


@pytest.fixture
def alone(bare_host: Host) -> Terminal:
    """A user without a daemon."""
    return Terminal(bare_host)


@pytest.fixture(scope="module")
def remotectl(shared_daemon: Host) -> Terminal:
    """A user whose daemon runs."""
    return Terminal(shared_daemon)


@dataclass
class GpuHost:
    """A daemon on a host with two cards of the fake driver."""

    remotectl: Terminal
    board: Board
    cards: tuple[str, str]


@pytest.fixture
def gpu_host(tmp_path: Path) -> Iterator[GpuHost]:
    board = Board(tmp_path / "board")
    cards = (board.add_gpu("NVIDIA GeForce RTX 3090"), board.add_gpu("NVIDIA L4", compute_capability=(8, 9)))
    board.write()
    with host(f'[gpu]\nnvml_library = "{build_library(tmp_path)}"\n') as made:
        made.start(REMOTED_FAKE_BOARD=os.fspath(board.path))
        yield GpuHost(Terminal(made), board, cards)


# -- looking -----------------------------------------------------------------------------------------------


def test_c04_status_has_stable_keys(remotectl: Terminal) -> None:
    document = remotectl.json("status")

    assert set(document) == {"daemon", "gpus", "gpu_problem", "gpus_seen_at", "pools", "workers", "fork_servers", "running", "queue", "others", "counts"}
    assert document["daemon"]["mode"] == "user"


def test_c04_status_of_a_running_and_a_waiting_job(remotectl: Terminal) -> None:
    job = remotectl.job("sleep", "60", name="looked-at")
    _wait_until_running(remotectl, job)

    code, out, _ = remotectl("status")
    shown = remotectl.json("status")
    remotectl("cancel", job)

    assert code == 0
    assert job[:10] in out
    assert "looked-at" in out
    worker = next(worker for worker in shown["workers"] if job in worker["running"])
    assert (worker["state"], worker["idle_until"]) == ("BUSY", None)
    assert "\x1b" not in out


def test_c04_status_does_not_import_what_it_does_not_need(remotectl: Terminal) -> None:
    """The budget of 100 ms, as a shape: no web server, no models, no click on this path."""
    program = (
        "import sys; from remoted.cli import main\ntry: main()\nfinally: print(sorted(set(sys.modules) & "
        "{'aiohttp', 'pydantic', 'rich', 'click', 'asyncio', 'http.client', 'ssl', 'subprocess', 'remoted_client'}), file=sys.stderr)"
    )
    process = remotectl.start("status", program=program)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)

    assert process.returncode == 0
    assert err.decode().strip() == "[]"


@pytest.mark.parametrize("command", ["ps", "gpus", "workers", "version", "doctor"])
def test_c04_printing_commands_have_json_and_text(remotectl: Terminal, command: str) -> None:
    assert remotectl.json(command)
    code, out, _ = remotectl(command)
    assert (code, bool(out.strip())) == (0, True)


def test_c04_top_shows_cpu_and_memory_of_workers(remotectl: Terminal) -> None:
    remotectl("run", "--", "true")

    rows = remotectl.json("top")["workers"]

    assert rows
    assert rows[0]["resident_bytes"] > 1_000_000


def test_c04_environments_and_configuration(remotectl: Terminal) -> None:
    assert remotectl.json("env", "list") == {"environments": []}
    assert remotectl.json("env", "prune") == {"removed": []}
    assert remotectl.json("config", "show")["limits"]["connections_per_uid"] == 512
    assert "connections_per_uid = 512\n" in remotectl("config", "show")[1]
    defaults = remotectl.json("config", "defaults")
    assert defaults["limits"] == remotectl.json("config", "show")["limits"]
    assert "\n[limits]\n" in remotectl("config", "defaults")[1]


# -- GPUs --------------------------------------------------------------------------------------------------


def test_c07_status_says_who_holds_a_gpu_and_who_uses_it_from_outside(gpu_host: GpuHost) -> None:
    held, used = gpu_host.cards
    gpu_host.board.set_fact(used, "utilization", 97)
    gpu_host.board.add_process(used, os.getpid(), 5 * GIB)
    gpu_host.board.write()
    job = gpu_host.remotectl("run", "-d", "--gpus", "1", "--name", "train", "--", "sleep", "60")[1].strip()
    _wait_until_running(gpu_host.remotectl, job)
    _wait_until(lambda: any(gpu["foreign"] for gpu in gpu_host.remotectl.json("gpus")["gpus"]))

    gpus = {gpu["uuid"]: gpu for gpu in gpu_host.remotectl.json("status")["gpus"]}
    _, out, _ = gpu_host.remotectl("status")

    holder = gpus[held]["holder"]
    assert (gpus[held]["name"], holder["pool"], holder["jobs"]) == ("NVIDIA GeForce RTX 3090", "run", [job])
    assert (gpus[held]["free"], gpus[used]["free"], gpus[used]["holder"]) == (False, False, None)
    assert gpus[used]["utilization_percent"] == 97
    (stranger,) = gpus[used]["foreign"]
    assert (stranger["pid"], stranger["uid"], stranger["used_bytes"]) == (os.getpid(), os.geteuid(), 5 * GIB)
    assert re.search(rf"RTX 3090 .*\(run\) {job[:10]}", out)
    assert f"outside: pid {os.getpid()} " in out


def test_c07_a_job_says_why_it_waits_for_a_gpu(gpu_host: GpuHost) -> None:
    first = gpu_host.remotectl("run", "-d", "--gpus", "2", "--", "sleep", "60")[1].strip()
    _wait_until_running(gpu_host.remotectl, first)
    second = gpu_host.remotectl("run", "-d", "--gpus", "1", "--", "true")[1].strip()

    shown = gpu_host.remotectl.json("show", second)
    _, out, _ = gpu_host.remotectl("status")

    assert (shown["status"], shown["state_reason"], shown["position"]) == ("IN_QUEUE", "WAITING_GPU", 1)
    assert f"WAITING_GPU: {shown['detail']}" in out
    gpu_host.remotectl("cancel", first)
    assert gpu_host.remotectl("wait", second)[0] == 0


# -- jobs --------------------------------------------------------------------------------------------------


def test_c04_run_has_the_commands_output_directory_and_exit_code(remotectl: Terminal) -> None:
    code, out, err = remotectl("run", "--", "sh", "-c", "pwd; echo oops >&2; exit 7")

    assert code == 7
    assert out == f"{os.path.realpath(remotectl.folder)}\n"
    assert "oops\n" in err


def test_c04_run_of_a_killed_and_of_a_missing_command(remotectl: Terminal) -> None:
    assert remotectl("run", "--", "sh", "-c", "kill -9 $$")[0] == 137
    code, _, err = remotectl("run", "--", "/nonexistent/program")
    assert code == 127
    assert "cannot run /nonexistent/program" in err


def test_c04_run_stops_at_its_timeout(remotectl: Terminal) -> None:
    code, _, err = remotectl("run", "--timeout", "0.3", "--", "sleep", "60")

    assert code == 1
    assert "timeout" in err


def test_f22_logs_give_each_stream_where_it_belongs_byte_for_byte(remotectl: Terminal) -> None:
    job = remotectl.job("sh", "-c", r"printf '10%%\r20%%\r'; printf 'warn\377\n' >&2; printf 'done\n'")

    following = remotectl.start("logs", "-f", job)
    out, err = following.communicate(timeout=PATIENCE_SECONDS)

    assert (following.returncode, out, err) == (0, b"10%\r20%\rdone\n", b"warn\xff\n")
    assert remotectl("logs", job[:9], "--stdout")[1].replace("\r", "") == "10%20%done\n"
    only = remotectl.start("logs", "--stderr", job)
    assert only.communicate(timeout=PATIENCE_SECONDS) == (b"", b"warn\xff\n")


def test_f22_logs_follow_live_and_ctrl_c_ends_only_the_following(remotectl: Terminal) -> None:
    job = remotectl.job("sh", "-c", "echo ready; exec sleep 60")
    following = remotectl.start("logs", "-f", job)
    assert following.stdout is not None
    line = following.stdout.readline()
    assert line == b"ready\n", following.communicate()

    following.send_signal(signal.SIGINT)

    _, err = following.communicate(timeout=PATIENCE_SECONDS)
    assert (following.returncode, err.strip()) == (130, b"")
    assert remotectl.json("show", job)["status"] == "IN_PROGRESS"
    remotectl("cancel", job)


def test_f22_what_a_detached_job_prints_is_no_part_of_its_id(remotectl: Terminal) -> None:
    """A warm worker prints before the id is known here: of many jobs some did."""
    for _ in range(10):
        code, out, err = remotectl("run", "--detach", "--", "echo", "early")
        assert (code, len(out.split()), len(out.strip())) == (0, 1, 32), (out, err)


def test_f25_cancel_ends_the_command_and_its_children(remotectl: Terminal) -> None:
    job = remotectl.job("sh", "-c", "sleep 61.5 & echo $!; sleep 61.5")
    following = remotectl.start("logs", "-f", job)
    assert following.stdout is not None
    child = int(following.stdout.readline())

    code, out, _ = remotectl("cancel", job[:10])

    following.communicate(timeout=PATIENCE_SECONDS)
    assert (code, out) == (0, f"{job}: cancelling\n")
    assert following.returncode == 1
    assert not _is_alive(child)
    assert remotectl.json("show", job)["status"] == "CANCELLED"
    assert remotectl("cancel", job)[1] == f"{job}: over already (CANCELLED)\n"


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_f25_ctrl_c_on_run_cancels_the_job(remotectl: Terminal) -> None:
    running = remotectl.start("run", "--name", "interrupted", "--", "sh", "-c", "echo ready; exec sleep 62")
    assert running.stdout is not None
    assert running.stdout.readline() == b"ready\n"
    job = next(job["id"] for job in remotectl.json("ps")["jobs"] if job["name"] == "interrupted")

    running.send_signal(signal.SIGINT)

    running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 130
    assert remotectl("wait", job)[0] == 1
    assert remotectl.json("show", job)["status"] == "CANCELLED"


def test_c04_wait_says_how_jobs_ended(remotectl: Terminal) -> None:
    good, bad = remotectl.job("true", name="good"), remotectl.job("sh", "-c", "exit 3", name="bad")

    assert remotectl("wait", good)[0] == 0
    code, out, _ = remotectl("wait", good, bad)

    assert code == 1
    assert f"{good} good COMPLETED" in out
    assert f"{bad} bad FAILED" in out
    assert [job["status"] for job in json.loads(remotectl("wait", "--json", good, bad)[1])["jobs"]] == ["COMPLETED", "FAILED"]


def test_c04_wait_gives_up_and_leaves_the_job_alone(remotectl: Terminal) -> None:
    job = remotectl.job("sleep", "63")

    code, _, err = remotectl("wait", "--timeout", "0.2", job)

    assert code == 1
    assert "it goes on" in err
    assert remotectl("cancel", job)[0] == 0


def test_c04_retry_runs_it_again_with_this_environment(remotectl: Terminal) -> None:
    job = remotectl.job("sh", "-c", "echo MODE=$MODE; test -n \"$MODE\"")
    assert remotectl("wait", job)[0] == 1

    remotectl.environ["MODE"] = "fast"
    again = remotectl("retry", job)[1].strip()
    del remotectl.environ["MODE"]

    assert again != job
    assert remotectl("wait", again)[0] == 0
    assert remotectl("logs", again)[1] == "MODE=fast\n"


def test_c04_show_and_ps_tell_attempts_and_reasons(remotectl: Terminal) -> None:
    job = remotectl.job("sh", "-c", "exit 4", name="failing")
    remotectl("wait", job)

    document = remotectl.json("show", job[:12])
    _, shown, _ = remotectl("show", job)
    _, listed, _ = remotectl("ps", "-a")

    assert (document["status"], document["state_reason"], len(document["attempt_list"])) == ("FAILED", "EXITED", 1)
    assert "EXITED" in shown
    assert re.search(rf"^{job[:10]}  failing .*FAILED", listed, re.MULTILINE)


def test_t19_names_cannot_steer_the_terminal(remotectl: Terminal) -> None:
    job = remotectl.job("true", name="\x1b[31mred\r\u202egnp\x07")
    remotectl("wait", job)

    for command in (("ps", "-a"), ("show", job), ("wait", job)):
        out = remotectl(*command)[1]
        assert not set(out) & {"\x1b", "\r", "\x07", "\u202e"}, command
        assert "\\x1b[31mred\\r\\u202egnp\\x07" in out


def test_t19_escape_leaves_readable_text_alone() -> None:
    assert text.escape("naïve 日本 ✓\nnext") == "naïve 日本 ✓\nnext"
    assert text.escape("a\tb\x9bc\u2028d\u200be\udcff") == "a\\tb\\x9bc\\u2028d\\u200be\\udcff"
    assert text.cell("x" * 50, 10) == "x" * 9 + "…"


# -- going wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "ps", "show 00", "logs 00", "cancel 00", "wait 00", "gpus", "status -w", "top", "env list"])
def test_c04_without_a_daemon_every_command_says_so_in_one_sentence(alone: Terminal, command: str) -> None:
    code, out, err = alone(*command.split())

    assert (code, out, err.count("\n")) == (3, "", 1)
    assert "no daemon answers at" in err
    assert "remoted --user" in err


def test_c04_the_version_is_an_option_too(remotectl: Terminal, alone: Terminal) -> None:
    for terminal in (remotectl, alone):
        assert terminal("--version") == terminal("version")
    assert remotectl("--version")[0] == 0
    assert "no daemon answers" in alone("--version")[1]


def test_c04_what_needs_no_daemon_works_without(alone: Terminal) -> None:
    assert alone("--help")[0] == 0
    assert "no daemon answers" in alone("version")[1]
    assert "_remotectl_completion" in alone("completion", "bash")[1]
    assert "the defaults hold" in alone("config", "check")[1]
    checks = json.loads(alone("doctor", "--json")[1])["checks"]
    names = {check["name"] for check in checks}
    assert names == {"python", "packages", "uv", "nvml", "state", "disk space", "configuration", "socket path", "daemon"}


def test_c04_doctor_calls_a_daemon_ill_that_does_not_answer_and_names_what_it_would_not_read(alone: Terminal) -> None:
    folder = Path(alone.environ["REMOTED_SOCKET"])
    folder.mkdir(mode=0o700, exist_ok=True)
    config = paths.user_paths(alone.environ).config
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("[gpu]\npol_seconds = 1\n")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(os.fspath(folder / "api.sock"))
        door.listen()
        doctor = alone.start("doctor", "--json")
        door.accept()[0].close()
        out, _ = doctor.communicate(timeout=PATIENCE_SECONDS)
    (folder / "api.sock").unlink()
    config.unlink()
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert (doctor.returncode, found["daemon"]["ok"], found["configuration"]["ok"]) == (1, False, False)
    assert "gpu.pol_seconds" in found["configuration"]["detail"]


def test_c04_config_check_names_the_wrong_key(alone: Terminal) -> None:
    file = alone.folder / "bad.toml"
    file.write_text("[gpu]\npol_seconds = 1\n")
    code, _, err = alone("config", "check", os.fspath(file))
    assert (code, "gpu.pol_seconds" in err) == (1, True)

    file.write_text("[limits]\nspeed = 1\n")
    assert "speed" in alone("config", "check", os.fspath(file))[2]
    assert alone("config", "check", "/nonexistent")[0] == 1


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["nonsense"], 2),
        (["status", "--nonsense"], 2),
        (["shwo"], 2),
        (["show"], 2),
        (["run"], 2),
        (["run", "--gpus", "1", "--cpus", "1", "--", "true"], 2),
        (["run", "--gpu", "NOT_A_GPU", "--", "true"], 2),
        (["run", "--gpus", "1", "--", "true"], 1),
        (["show", "ffffffffffffffff0"], 4),
        (["logs", "zz"], 4),
        (["cancel", "../../etc"], 4),
        (["wait", "ffffffffffffffff0"], 4),
        (["retry", "ffffffffffffffff0"], 4),
    ],
)
def test_c04_exit_codes(remotectl: Terminal, command: list[str], code: int) -> None:
    found, out, err = remotectl(*command)

    assert (found, out) == (code, "")
    assert "Traceback" not in err
    assert err.strip()


def test_c04_a_reader_that_leaves_early_is_no_error(remotectl: Terminal) -> None:
    process = remotectl.start("config", "show")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()

    assert (process.wait(PATIENCE_SECONDS), err) == (0, b"")


@pytest.mark.parametrize("environ", [{"REMOTED_SOCKET": "/a"}, {"XDG_RUNTIME_DIR": "/b"}, {"REMOTED_SOCKET": "", "XDG_RUNTIME_DIR": ""}])
def test_c02_the_socket_directory_is_the_daemons(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REMOTED_SOCKET", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    assert transport.socket_directory() == os.fspath(paths.socket_directory(environ))


FAKE = """
import os, socket, sys
os.setgid(60001); os.setuid(60001)
with socket.socket(socket.AF_UNIX) as sock:
    sock.bind(sys.argv[1]); os.chmod(sys.argv[1], 0o777); sock.listen()
    print("listening", flush=True)
    connection, _ = sock.accept()
    print(connection.recv(1000), flush=True)
"""


@needs_root
def test_t08_a_strangers_daemon_gets_not_one_byte(bare_host: Host) -> None:
    folder = Path(tempfile.mkdtemp(prefix="rc-"))
    folder.chmod(0o777)
    victim = Terminal(bare_host)
    victim.environ["REMOTED_SOCKET"] = os.fspath(folder)
    fake = subprocess.Popen([sys.executable, "-S", "-c", FAKE, os.fspath(folder / "api.sock")], stdout=subprocess.PIPE, cwd="/")
    assert fake.stdout is not None
    assert fake.stdout.readline() == b"listening\n"

    code, _, err = victim("status")

    received, _ = fake.communicate(timeout=PATIENCE_SECONDS)
    assert code == 3
    assert "uid 60001" in err
    assert received == b"b''\n"
    shutil.rmtree(folder)


def _wait_until_running(terminal: Terminal, job: str) -> None:
    _wait_until(lambda: terminal.json("show", job)["status"] == "IN_PROGRESS")


def _wait_until(condition: Callable[[], bool]) -> None:
    """For what another process does without an event for us; each question takes long enough to need no pause."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
