"""run: a command as a job, through the same client that everybody's scripts use."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import sys
from typing import Any

import click

from remoted.cli import transport
from remoted.cli.ending import CliError, NoDaemon, UsageError
from remoted.cli.text import escape, print_json, short

_WORKERS = 32
_IDLE_SECONDS = 30
#: How long a program in front of us in a pipe has to say something.
_INPUT_MILLISECONDS = 200
#: Whoever types a command watches it; the client's hour is meant for functions.
_NO_LIMIT_SECONDS = 365 * 86_400.0


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--gpus", type=click.IntRange(1, 64), help="So many GPUs of any kind.")
@click.option("--gpu", "groups", multiple=True, metavar="GROUP", help="A GPU of this group or model, e.g. ADA_24; may be given again.")
@click.option("--cpus", type=click.IntRange(min=1), help="Reserve so many CPUs.")
@click.option("--name", help="Its name in lists; by default the command's.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Stop it after so many seconds.")
@click.option("-d", "--detach", is_flag=True, help="Print the job's id and leave; see `remotectl logs -f`.")
@click.option("-i", "--stdin", "with_stdin", is_flag=True, help="Wait for the end of standard input and pass it on; done unasked when a file or a pipe has something to read.")
@click.option("--json", "as_json", is_flag=True, help="Print one document at the end (with --detach: the id) instead of the output.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    gpus: int | None,
    groups: tuple[str, ...],
    cpus: int | None,
    name: str | None,
    timeout: float | None,
    detach: bool,
    with_stdin: bool,
    as_json: bool,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND as a job in this directory, with its output here; ends with its exit code. Ctrl-C stops the job.

    Standard input is read to its end before the job is submitted; a terminal's never is.
    """
    if cpus and (gpus or groups):
        raise UsageError("cannot reserve CPUs together with GPUs: leave one out")
    if cpus and cpus > (most := _host_cpus()):
        raise CliError(f"cannot reserve {cpus} CPUs: this host lends {most:g}; ask for at most {int(most)}")
    config = _config(gpus, groups, cpus)
    stdin = sys.stdin.buffer.read() if with_stdin or _has_input() else b""
    return _submit(config, list(command), stdin, name or os.path.basename(command[0]), timeout, detach, as_json)


def _host_cpus() -> float:
    try:
        return float(transport.get("/v1/status")["counts"]["cpus"])
    except NoDaemon:
        return float(len(os.sched_getaffinity(0)))


def _has_input() -> bool:
    """Is standard input a file or a pipe in which something stands? A pipe that is only open may stay so for ever."""
    try:
        kind = os.fstat(0).st_mode
    except OSError:
        return False
    if stat.S_ISREG(kind):
        return True
    if not stat.S_ISFIFO(kind) and not stat.S_ISSOCK(kind):
        return False
    poller = select.poll()
    poller.register(0, select.POLLIN)
    return bool(poller.poll(_INPUT_MILLISECONDS))


def _config(gpus: int | None, groups: tuple[str, ...], cpus: int | None) -> Any:
    from remoted_client import CpuLiveServerless, LiveServerless

    common: dict[str, Any] = {"name": "run", "workersMax": _WORKERS, "idleTimeout": _IDLE_SECONDS}
    try:
        if gpus or groups:
            return LiveServerless(**common, gpus=list(groups) or ["ANY"], gpuCount=gpus or 1)
        return CpuLiveServerless(**common, cpuCount=cpus)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _submit(config: Any, command: list[str], stdin: bytes, name: str, timeout: float | None, detach: bool, as_json: bool) -> int:
    from remoted_client import DaemonUnreachable, NoMatchingGPU, RemotedError, remote
    from remoted_client.errors import WITHOUT_GPU
    from remoted_client.printed import echo

    if detach or as_json:
        echo.end()  # whoever reads the id or the document reads nothing else, however soon the command prints
    try:
        function = remote(config, max_retries=0, timeout=timeout or _NO_LIMIT_SECONDS)(run_command)
        handle = function.options(detach=detach, name=name)(command, stdin)
        if detach:
            print_json({"id": handle.id}) if as_json else print(handle.id)
            return 0
        job = _await(handle)
        if as_json:
            print_json(_document(job))
        return _exit_code(job, as_json)
    except DaemonUnreachable as error:
        raise NoDaemon(str(error)) from error
    except NoMatchingGPU as error:
        raise CliError(f"{str(error).removesuffix(WITHOUT_GPU)}; leave --gpus and --gpu out if the command needs none, or see `remotectl gpus`") from error
    except RemotedError as error:
        raise CliError(str(error)) from error


def _await(handle: Any) -> Any:
    try:
        return handle.result()
    except KeyboardInterrupt:
        print(f"remotectl: stopping job {short(handle.id)}; it has 10 s to end", file=sys.stderr)
        raise


def _document(job: Any) -> dict[str, Any]:
    code = 0 if job.error is None else _own_code(job)
    wanted = ("id", "error", "state_reason", "started_at", "ended_at", "attempts", "run_seconds", "stdout", "stderr")
    return {**{name: getattr(job, name) for name in wanted}, "status": job.status.value, "exit_code": code}


def _own_code(job: Any) -> int | None:
    return int(job.exception.code or 0) if isinstance(job.exception, SystemExit) else None


def _exit_code(job: Any, silently: bool) -> int:
    """The command's own; 1 when the job ended in another way."""
    if (code := _own_code(job)) is not None:
        return code
    if job.error and silently:
        return 1
    if job.error:
        print(f"remotectl: {escape(job.error)}", file=sys.stderr)
        return 1
    return 0


def run_command(command: list[str], stdin: bytes) -> None:
    """In the worker: the command with the worker's own output pipes; what stops the body stops it, and its children.

    Exits like the command, as a shell gives it (128 + N for signal N): so the job fails when the command does.
    """
    import signal
    import subprocess
    import tempfile

    from remoted_client.command import cannot_run, ended

    try:
        with tempfile.TemporaryFile() as file:  # and no pipe: nobody has to keep filling it
            file.write(stdin)
            file.seek(0)
            process = subprocess.Popen(command, stdin=file if stdin else subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        end = cannot_run(command[0], error)
        os.write(2, f"{end}\n".encode(errors="replace"))
        raise end from None
    try:
        code = process.wait()
    finally:
        for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, None)):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
    if code:
        raise ended(code)
