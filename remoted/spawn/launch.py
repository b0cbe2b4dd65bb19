"""From a LaunchSpec to a process, in a thread with a deadline.

``Popen`` returns only when the child has exec'ed, so an interpreter on a frozen file system would hold the
event loop for as long as it hangs (MECHANISMS 1). In user mode the worker runs as the daemon's own user; no
path of anybody else is touched. The system's daemon executes ``entry``, which becomes the user first.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from remoted.errors import SpawnError
from remoted.spawn.becoming import Becoming, command


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """What a worker process is: argv (interpreter first), its environment, the descriptors it inherits."""

    argv: tuple[str, ...]
    environ: Mapping[str, str]
    stdout: int
    stderr: int
    pass_fds: tuple[int, ...]
    #: As whom, where that is not the daemon's own user.
    becoming: Becoming | None = None


@dataclass(frozen=True, slots=True)
class Process:
    """A started process; ``pidfd`` is ours to close."""

    pid: int
    pidfd: int


async def launch(spec: LaunchSpec, deadline_seconds: float) -> Process:
    """Start the process. Raises SpawnError naming the program and the reason."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Process] = loop.create_future()
    thread = threading.Thread(target=_launch_in_thread, args=(spec, loop, future), name="launch", daemon=True)
    thread.start()
    try:
        return await asyncio.wait_for(asyncio.shield(future), deadline_seconds)
    except TimeoutError:
        future.add_done_callback(_abandon)
        raise SpawnError(f"cannot start {spec.argv[0]}: it did not begin within {deadline_seconds:g} s") from None


def _launch_in_thread(spec: LaunchSpec, loop: asyncio.AbstractEventLoop, future: asyncio.Future[Process]) -> None:
    # The child inherits this thread's mask, and the daemon's may come from a careless parent (T25).
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        process = _start(spec)
    except (OSError, ValueError) as error:
        reason = SpawnError(f"cannot start {spec.argv[0]}: {error}")
        loop.call_soon_threadsafe(_settle, future, None, reason)
    else:
        loop.call_soon_threadsafe(_settle, future, process, None)


def _start(spec: LaunchSpec) -> Process:
    if spec.becoming is None:
        return _popen(spec, spec.argv, spec.environ, spec.pass_fds)
    for pipe in (spec.stdout, spec.stderr):  # /dev/stderr opens it once more, as the user
        os.fchown(pipe, spec.becoming.identity.uid, spec.becoming.identity.gid)
    argv, orders = command(spec.becoming, spec.argv, spec.environ, spec.pass_fds)
    try:
        rules = spec.becoming.device_rules
        return _popen(spec, argv, {}, (*spec.pass_fds, orders, *([rules[1]] if rules else [])))
    finally:
        os.close(orders)


def _popen(spec: LaunchSpec, argv: tuple[str, ...], environ: Mapping[str, str], pass_fds: tuple[int, ...]) -> Process:
    child = subprocess.Popen(
        argv,
        env=dict(environ),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=spec.stdout,
        stderr=spec.stderr,
        pass_fds=pass_fds,
        start_new_session=True,
    )
    child.returncode = 0  # waited for by pidfd elsewhere: Popen must neither reap it nor warn
    return Process(child.pid, os.pidfd_open(child.pid))


def _settle(future: asyncio.Future[Process], process: Process | None, error: SpawnError | None) -> None:
    if error is not None:
        future.set_exception(error)
    elif process is not None:
        future.set_result(process)


def _abandon(future: asyncio.Future[Process]) -> None:
    """The process began after its deadline: nobody waits for it any more."""
    if future.exception() is None:
        process = future.result()
        os.kill(process.pid, 9)
        os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED)
        os.close(process.pidfd)
