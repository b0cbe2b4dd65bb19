"""What a later trial found about what runs: commands, what bodies leave behind, signals, streams over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.harness import wait_until
from tests.integration.test_c04_remotectl import PATIENCE_SECONDS, Terminal, remotectl  # noqa: F401


@pytest.mark.parametrize(
    ("command", "code", "expected"),
    [
        (["sh", "-c", "exit 3"], 3, "the command exited with code 3"),
        (["sh", "-c", "kill -9 $$"], 137, "the command was killed by signal 9 (SIGKILL)"),
        (["nosuchcmd"], 127, "cannot run nosuchcmd: not found"),
        (["/dev/null"], 126, "cannot run /dev/null: permission denied"),
    ],
)
def test_c04_a_command_ends_in_the_words_of_commands(remotectl: Terminal, command: list[str], code: int, expected: str) -> None:  # noqa: F811
    job = remotectl.job(*command)
    _, waited, _ = remotectl("wait", job)
    document = remotectl.json("show", job)
    assert (document["error"], document["state_reason"], document["status"]) == (expected, "EXITED", "FAILED")
    assert expected in waited + remotectl("show", job)[1]
    assert "Traceback" not in remotectl("show", job)[1]
    assert remotectl("run", "--", *command)[0] == code


def test_c04_a_command_without_a_gpu_is_not_told_about_functions(remotectl: Terminal) -> None:  # noqa: F811
    code, _, err = remotectl("run", "--gpus", "1", "--", "true")
    assert code == 1
    assert "leave --gpus and --gpu out" in err
    assert "local" not in err


HEAD = """
import json, os, signal, subprocess, sys, time
from remoted_client import *
from remoted_client import remote, CpuLiveServerless
"""


def test_c04_what_a_body_leaves_running_is_counted(remotectl: Terminal) -> None:  # noqa: F811
    path = remotectl.folder / "leaving.py"
    path.write_text(
        HEAD
        + """
queue = CpuLiveServerless(name="leaving", workersMax=1)
@remote(queue)
def leave(): return subprocess.Popen(["sleep", "600"], start_new_session=True).pid
@remote(queue)
def start_and_wait():
    subprocess.Popen(["sleep", "600"])
    print("started", flush=True)
    time.sleep(600)
pid = leave().result().unwrap()
print(json.dumps(pid), flush=True)
sys.stdin.readline()
handle = start_and_wait()
print(handle.id, flush=True)
sys.stdin.readline()
handle.cancel()
handle.result()
os.kill(pid, signal.SIGKILL)
""",
        encoding="utf-8",
    )
    script = subprocess.Popen([sys.executable, str(path)], env=remotectl.environ, cwd=remotectl.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert script.stdin is not None
    assert script.stdout is not None

    def counted() -> list[int]:
        shown = [document["workers"] for document in (remotectl.json("workers"), remotectl.json("status"))]
        assert [worker["id"] for worker in shown[0]] == [worker["id"] for worker in shown[1]]
        return [worker["leftovers"] for worker in shown[0] if worker["pool"] == "leaving"]

    assert json.loads(script.stdout.readline()) > 0
    assert counted() == [1]
    assert "LEFTOVERS" in remotectl("workers")[1]
    script.stdin.write("\n")
    script.stdin.flush()
    # What the body prints is echoed there too, and may come before its id.
    assert "started" in (script.stdout.readline().strip(), script.stdout.readline().strip())
    assert counted() == [1], "what the running call has started is its own"
    script.communicate("\n", timeout=60)
    wait_until(lambda: counted() == [0], 30)


@pytest.mark.parametrize("command", [["top"], ["status", "-w"], ["status", "-w", "--json"]])
def test_c04_what_is_shown_again_and_again_is_plain_in_a_pipe_and_ends_with_its_reader(remotectl: Terminal, command: list[str]) -> None:  # noqa: F811
    process = remotectl.start(*command)
    assert process.stdout is not None
    assert process.stderr is not None
    shown = process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert shown
    assert b"\x1b" not in shown
    assert (process.wait(PATIENCE_SECONDS), err) == (0, b"")
