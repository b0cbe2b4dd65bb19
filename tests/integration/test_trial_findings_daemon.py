"""What the first trial of the daemon and of remotectl found, each as its user met it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.wheels import make_slow_source, make_wheel
from tests.harness import Host, wait_until
from tests.integration.test_c04_remotectl import PATIENCE_SECONDS, Terminal, alone, remotectl  # noqa: F401

HEAD = """
import json, os, signal, sys, time
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, PodTemplate
queue = CpuLiveServerless(name="queue", workersMax=2)
"""


@pytest.fixture
def offline(bare_host: Host, tmp_path: Path) -> Host:
    make_wheel(tmp_path, "tinydep", "1.0", {"tinydep": "x = 5\n"})
    bare_host.config.write_text(f'[environments]\nwheel_folders = ["{tmp_path}"]\noffline = true\n', encoding="utf-8")
    return bare_host.start()


def test_f14_one_build_is_shown_once_to_a_script_with_many_calls(offline: Host) -> None:
    found = offline.run(
        HEAD
        + """
@remote(queue, dependencies=["tinydep"], max_retries=0)
def f(n):
    import tinydep
    return n * tinydep.x
outs = [h.result() for h in [f(n) for n in range(12)]]
print(json.dumps([[o.output for o in outs], [o.stderr.count("tinydep") > 0 for o in outs]]))
"""
    )
    outputs, told = found.json
    assert outputs == [n * 5 for n in range(12)]
    assert sum(told) == 1, "one job keeps what the installer said"
    assert found.err.count("+ tinydep==1.0") == 1


def test_f14_a_failed_build_is_explained_in_full_once_and_named_by_the_others(offline: Host) -> None:
    errors = offline.run(
        HEAD
        + """
@remote(queue, dependencies=["nosuchdep"], max_retries=0)
def f(n): return n
outs = [h.result() for h in [f(n) for n in range(4)]]
print(json.dumps([[o.id, o.status, o.error] for o in outs]))
"""
    ).json
    assert all(status == "FAILED" and "nosuchdep" in error for _, status, error in errors)
    pointing = [error for _, _, error in errors if "what the installer printed is in the error of" in error]
    (full,) = [job for job, _, error in errors if error not in pointing]
    assert len(pointing) == 3
    assert all(error.endswith(full) for error in pointing)


def test_f14_a_job_that_waits_for_its_environment_names_the_packages(offline: Host, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    make_slow_source(tmp_path, "slowdep", "1.0", flag)
    job = offline.run(HEAD + "@remote(queue, dependencies=['slowdep'])\ndef f(): return 1\nprint(f.options(detach=True)().id)").out.strip()
    wait_until(lambda: flag.read_text() != "", 30)
    terminal = Terminal(offline)
    shown = terminal.json("show", job)
    terminal("cancel", job)
    assert (shown["state_reason"], shown["detail"]) == ("WAITING_ENV", "building slowdep")


def test_m07_logs_run_config_and_watching_have_json(remotectl: Terminal) -> None:  # noqa: F811
    code, out, err = remotectl("run", "--json", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    document = json.loads(out)
    assert (code, document["exit_code"], document["stdout"], document["stderr"], document["status"]) == (3, 3, "out\n", "err\n", "FAILED"), err
    lines = [json.loads(line) for line in remotectl("logs", document["id"], "--json")[1].splitlines()]
    assert sorted((line["stream"], line["text"]) for line in lines) == [("stderr", "err\n"), ("stdout", "out\n")]
    assert remotectl.json("config")["limits"] == remotectl.json("config", "show")["limits"]
    assert remotectl.json("config", "check")["good"]
    assert re.fullmatch("[0-9a-f]{32}", json.loads(remotectl("run", "-d", "--json", "--", "true")[1])["id"])
    watching = remotectl.start("status", "-w", "--json")
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline())["daemon"]
    assert json.loads(watching.stdout.readline())["daemon"]
    watching.send_signal(signal.SIGINT)
    watching.communicate(timeout=PATIENCE_SECONDS)


def test_m10_more_cpus_than_the_host_has(daemon: Host) -> None:
    terminal = Terminal(daemon)
    code, _, err = terminal("run", "--cpus", "4096", "--", "true")
    assert code == 1
    assert "cannot reserve 4096 CPUs: this host lends" in err
    job = daemon.run(HEAD + "@remote(CpuLiveServerless(name='big', cpuCount=4096))\ndef f(): time.sleep(60)\nprint(f.options(detach=True)().id)").out.strip()
    assert "asked for 4096 CPUs, this host lends " in terminal.json("show", job)["detail"]
    job = daemon.run(HEAD + "@remote(CpuLiveServerless(name='huge', podTemplate=PodTemplate(memory_gb=100000)))\ndef f(): time.sleep(60)\nprint(f.options(detach=True)().id)").out.strip()
    assert "asked for 100000 GiB of memory, this host has " in terminal.json("show", job)["detail"]


def test_m12_seventy_scripts_at_once(daemon: Host) -> None:
    script = daemon.write("one.py", HEAD + "@remote(queue)\ndef f(): return 1\nh = f(); h.id\nprint(sys.stdin.readline() and h.result().output)")
    processes = [
        subprocess.Popen([sys.executable, str(script)], env=daemon.environ, cwd=daemon.project, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(70)
    ]
    ended = [process.communicate("\n", timeout=100) for process in processes]
    assert [out.strip() for out, _ in ended] == ["1"] * 70, next(err for out, err in ended if out.strip() != "1")


def test_m19_ps_filters_and_pages(daemon: Host) -> None:
    terminal = Terminal(daemon)
    daemon.run(
        HEAD
        + """
other = CpuLiveServerless(name="other", workersMax=2)
@remote(queue, max_retries=0)
def good(n): return n
@remote(other, max_retries=0)
def bad(n): raise ValueError(n)
for h in [good(n) for n in range(1100)] + [bad(n) for n in range(3)]: h.result()
""",
        timeout=100,
    )
    everything = terminal.json("ps", "-a", "--limit", "5000")["jobs"]
    assert len({job["id"] for job in everything}) == 1103
    assert everything == sorted(everything, key=lambda job: -job["submitted_at"])
    assert len(terminal.json("ps", "-a", "--limit", "1050")["jobs"]) == 1050
    assert [job["name"] for job in terminal.json("ps", "--status", "failed")["jobs"]] == ["bad"] * 3
    assert len(terminal.json("ps", "-a", "--pool", "other")["jobs"]) == 3
    assert len(terminal.json("ps", "-a", "--name", "go*", "--limit", "7")["jobs"]) == 7
    assert terminal.json("ps", "-a", "--status", "FAILED", "--pool", "queue")["jobs"] == []
    assert terminal("ps", "--pool", "none")[1] == "no such job\n"


def test_m20_run_passes_standard_input_on(remotectl: Terminal) -> None:  # noqa: F811
    def run(data: bytes, *options: str) -> bytes:
        command = [sys.executable, "-c", "from remoted.cli import main; main()", "run", *options, "--", "cat"]
        return subprocess.run(command, input=data, env=remotectl.environ, cwd=remotectl.folder, capture_output=True, timeout=60).stdout

    assert run(b"hello\n") == b"hello\n"
    assert run(b"x" * 300_000 + b"\n", "-i") == b"x" * 300_000 + b"\n"
    assert run(b"") == b""


def test_m20_a_pipe_that_stays_silent_does_not_hold_run_up(remotectl: Terminal) -> None:  # noqa: F811
    command = [sys.executable, "-c", "from remoted.cli import main; main()", "run", "--", "echo", "done"]
    process = subprocess.Popen(command, env=remotectl.environ, cwd=remotectl.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"done\n"
    assert process.wait(PATIENCE_SECONDS) == 0
    process.stdin.close()
    process.stdout.close()


def test_l10_a_mistyped_command_is_corrected(remotectl: Terminal) -> None:  # noqa: F811
    assert "did you mean 'show'?" in remotectl("shwo")[2]


def test_l06_an_instance_that_was_rebuilt_for_the_second_attempt_says_so(daemon: Host) -> None:
    found = daemon.run(
        HEAD
        + """
@remote(queue, max_retries=1)
class Counter:
    def __init__(self): self.n = 0
    def die_once(self, path):
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.n
out = Counter().die_once(os.path.abspath("died")).result()
print(json.dumps([out.status, out.attempts, out.reconstructed]))
"""
    ).json
    assert found == ["COMPLETED", 2, True]


def test_l19_doctor_reports_the_daemons_state_folder(daemon: Host) -> None:
    terminal = Terminal(daemon)
    terminal.environ = {**terminal.environ, "HOME": "/", "XDG_STATE_HOME": str(daemon.folder / "elsewhere")}
    checks = {check["name"]: check["detail"] for check in terminal.json("doctor")["checks"]}
    assert checks["state"].startswith(str(daemon.state / "remoted"))


def test_l20_a_running_job_has_run_for_some_time(daemon: Host) -> None:
    terminal = Terminal(daemon)
    job = terminal.job("sleep", "60")
    wait = terminal.start("wait", job, "--timeout", "1")
    wait.communicate(timeout=PATIENCE_SECONDS)
    (shown,) = terminal.json("ps")["jobs"]
    assert 0.5 < shown["run_seconds"] < 30


def test_f22_logs_tell_attempts_apart_where_somebody_looks_and_give_files_the_bytes_alone(remotectl: Terminal, shared_daemon: Host) -> None:  # noqa: F811
    job = shared_daemon.run(
        HEAD
        + """
@remote(queue, max_retries=2)
def f(path):
    print("try", end="")
    with open(path, "a") as file: file.write("x")
    if os.path.getsize(path) < 3: raise OSError("not yet")
    return 5
out = f(sys.argv[1]).result()
print()
print(json.dumps([out.id, out.stdout]))
""",
        str(shared_daemon.project / "f22-attempts"),
    )
    job_id, printed = job.json

    assert printed == "trytrytry"
    assert job.out.startswith(printed), "the caller saw what was printed and nothing else"
    assert remotectl("logs", job_id) == (0, "trytrytry", "")
    assert remotectl("logs", job_id, "--stdout")[1] == "trytrytry"
    lines = [json.loads(line) for line in remotectl("logs", job_id, "--json")[1].splitlines()]
    assert lines == [{"attempt": number, "stream": "stdout", "text": "try"} for number in (1, 2, 3)]
    assert remotectl.on_a_screen("logs", job_id) == (0, ["try", "-- attempt 2 of 3 --", "try", "-- attempt 3 of 3 --", "try"])
