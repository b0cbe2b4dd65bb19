"""run: a command as a job, through the same client that everybody's scripts use."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from remoted.cli.ending import CliError, NoDaemon, UsageError
from remoted.cli.text import escape

_WORKERS = 32
_IDLE_SECONDS = 30
#: Whoever types a command watches it; the client's hour is meant for functions.
_NO_LIMIT_SECONDS = 365 * 86_400.0


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--gpus", type=click.IntRange(1, 64), help="So many GPUs of any kind.")
@click.option("--gpu", "groups", multiple=True, metavar="GROUP", help="A GPU of this group or model, e.g. ADA_24; may be given again.")
@click.option("--cpus", type=click.IntRange(min=1), help="Reserve so many CPUs.")
@click.option("--name", help="Its name in lists; by default the command's.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Stop it after so many seconds.")
@click.option("-d", "--detach", is_flag=True, help="Print the job's id and leave; see `remotectl logs -f`.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    gpus: int | None,
    groups: tuple[str, ...],
    cpus: int | None,
    name: str | None,
    timeout: float | None,
    detach: bool,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND as a job in this directory, with its output here; ends with its exit code."""
    if cpus and (gpus or groups):
        raise UsageError("cannot reserve CPUs together with GPUs: leave one out")
    config = _config(gpus, groups, cpus)
    return _submit(config, list(command), name or os.path.basename(command[0]), timeout, detach)


def _config(gpus: int | None, groups: tuple[str, ...], cpus: int | None) -> Any:
    from remoted_client import CpuLiveServerless, LiveServerless

    common: dict[str, Any] = {"name": "run", "workersMax": _WORKERS, "idleTimeout": _IDLE_SECONDS}
    try:
        if gpus or groups:
            return LiveServerless(**common, gpus=list(groups) or ["ANY"], gpuCount=gpus or 1)
        return CpuLiveServerless(**common, cpuCount=cpus)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _submit(config: Any, command: list[str], name: str, timeout: float | None, detach: bool) -> int:
    from remoted_client import DaemonUnreachable, RemotedError, remote

    try:
        function = remote(config, max_retries=0, timeout=timeout or _NO_LIMIT_SECONDS)(run_command)
        handle = function.options(detach=detach, name=name)(command)
        if detach:
            print(handle.id)
            return 0
        return _exit_code(handle.result())
    except DaemonUnreachable as error:
        raise NoDaemon(str(error)) from error
    except RemotedError as error:
        raise CliError(str(error)) from error


def _exit_code(job: Any) -> int:
    """The command's own; 1 when the job ended in another way."""
    if isinstance(job.exception, SystemExit):
        return int(job.exception.code or 0)
    if job.error:
        print(f"remotectl: {escape(job.error)}", file=sys.stderr)
        return 1
    return 0


def run_command(command: list[str]) -> None:
    """In the worker: the command with the worker's own output pipes; what stops the body stops it, and its children.

    Exits like the command, as a shell gives it (128 + N for signal N): so the job fails when the command does.
    """
    import contextlib
    import signal
    import subprocess

    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error.strerror}\n".encode(errors="replace"))
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)
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
        sys.exit(128 - code if code < 0 else code)
