"""Short-lived processes (uv, a question to an interpreter): start, stream, end with the whole tree.

The process leads a session of its own, reads /dev/null and writes stdout and stderr into one pipe. However the
wait ends (exit, deadline, cancellation), everything that the process started is killed and the process is reaped;
no descriptor is left. Called for environment builds; workers are started by ``launch``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from remoted.errors import SpawnError
from remoted.spawn import reaper
from remoted.spawn.launch import Process

_READ_BYTES = 1 << 16
#: At most this many reads per turn of the loop: a chatty process must not starve the connections.
_READS_PER_TURN = 16
#: A pipe holds 64 KiB (pipe(7)) and at most 1 MiB; more than this comes from a process that was left behind.
_DRAIN_READS = 32
_LOOKS = 20
_DEATH_LOOKS = 200


@dataclass(frozen=True, slots=True)
class _Start:
    """What the starting thread needs; ``output`` is the write end of the pipe, closed by that thread."""

    argv: tuple[str, ...]
    environ: dict[str, str]
    cwd: str
    output: int
    mark: str


async def run_helper(
    argv: Sequence[str],
    environ: Mapping[str, str],
    on_output: Callable[[bytes], None],
    deadline_seconds: float,
    cwd: str = "/",
) -> reaper.ExitStatus:
    """Run ``argv`` to its end and say how it ended; ``on_output`` gets stdout and stderr as they come.

    Raises SpawnError when the process cannot be started and TimeoutError after ``deadline_seconds``; then, as
    after a cancellation, its tree is dead before this returns (or dies at birth, if it was only being started).
    An exception of ``on_output`` ends the process too.
    """
    mark = f"helper-{secrets.token_hex(8)}"
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        os.set_blocking(reading, False)
        start = _Start(tuple(argv), {**environ, reaper.WORKER_VARIABLE: mark}, cwd, writing, mark)
        async with asyncio.timeout(deadline_seconds):
            process = await _started(start)
            return await _followed(process, reading, on_output, mark)
    except TimeoutError:
        raise TimeoutError(f"{argv[0]} did not end within {deadline_seconds:g} s and was killed") from None
    finally:
        os.close(reading)


async def _started(start: _Start) -> Process:
    """Popen returns only after exec, which may hang on a frozen file system: hence a thread, as in ``launch``."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Process] = loop.create_future()
    threading.Thread(target=_start_in_thread, args=(start, loop, future), name="helper", daemon=True).start()
    return await future


def _start_in_thread(start: _Start, loop: asyncio.AbstractEventLoop, future: asyncio.Future[Process]) -> None:
    try:
        process = _start(start)
    except (OSError, ValueError) as error:
        reason = SpawnError(f"cannot start {start.argv[0]}: {error}")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(_fail, future, reason)
        return
    try:
        loop.call_soon_threadsafe(_hand_over, future, process, start.mark)
    except RuntimeError:
        _end(process, start.mark)


def _start(start: _Start) -> Process:
    try:
        child = subprocess.Popen(
            start.argv,
            env=start.environ,
            cwd=start.cwd,
            stdin=subprocess.DEVNULL,
            stdout=start.output,
            stderr=start.output,
            start_new_session=True,
        )
    finally:
        os.close(start.output)
    child.returncode = 0  # waited for by pidfd: Popen must neither reap it nor warn
    return Process(child.pid, os.pidfd_open(child.pid))


def _fail(future: asyncio.Future[Process], error: SpawnError) -> None:
    if not future.done():
        future.set_exception(error)


def _hand_over(future: asyncio.Future[Process], process: Process, mark: str) -> None:
    if future.done():  # cancelled while the process was being started
        threading.Thread(target=_end, args=(process, mark), name="helper-end", daemon=True).start()
    else:
        future.set_result(process)


async def _followed(process: Process, reading: int, on_output: Callable[[bytes], None], mark: str) -> reaper.ExitStatus:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(process.pidfd, lambda: None if ended.done() else ended.set_result(None))
    loop.add_reader(reading, _pump, loop, reading, on_output, ended)
    try:
        await ended
        await _drained(reading, on_output)
    finally:
        loop.remove_reader(process.pidfd)
        loop.remove_reader(reading)
        # One thread does it all, so that a second cancellation during the wait leaves nothing half done.
        status = await asyncio.shield(loop.run_in_executor(None, _end, process, mark))
    return status


async def _drained(reading: int, on_output: Callable[[bytes], None]) -> None:
    """What it wrote last: not to the end of file, which a process left behind may hold open."""
    with contextlib.suppress(EOFError):
        for _ in range(_DRAIN_READS):
            if not _read_some(reading, on_output):
                return
            await asyncio.sleep(0)


def _pump(loop: asyncio.AbstractEventLoop, reading: int, on_output: Callable[[bytes], None], ended: asyncio.Future[None]) -> None:
    try:
        for _ in range(_READS_PER_TURN):
            if not _read_some(reading, on_output):
                break
    except EOFError:
        loop.remove_reader(reading)
    except Exception as error:  # of on_output: goes to whoever gave it
        loop.remove_reader(reading)
        if not ended.done():
            ended.set_exception(error)


def _read_some(reading: int, on_output: Callable[[bytes], None]) -> bool:
    """Pass on one piece; False when there is none now. Raises EOFError at the end while the process lives."""
    try:
        data = os.read(reading, _READ_BYTES)
    except BlockingIOError:
        return False
    if not data:
        raise EOFError
    on_output(data)
    return True


def _end(process: Process, mark: str) -> reaper.ExitStatus:
    """Kill the tree, reap it, close the pidfd. Blocks for as long as that takes (milliseconds)."""
    try:
        killed = _kill_alive(process) if _is_alive(process.pidfd) else []
        # Until it is reaped its pid, and with it the number of its session, cannot be somebody else's.
        killed += _kill_session(process.pid)
        reaper.kill_orphans(mark, process.pid)
        _await_death(killed)
        return reaper.reap(process.pidfd)
    finally:
        os.close(process.pidfd)


def _is_alive(pidfd: int) -> bool:
    try:
        return os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _kill_alive(process: Process) -> list[psutil.Process]:
    """Stopped, the leader cannot fork past the looks at its descendants; dead but not reaped, it keeps its pid."""
    reaper.send(process.pidfd, signal.SIGSTOP)
    killed = _kill_until_none(lambda: reaper.descendants(process.pid))
    reaper.send(process.pidfd, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED | os.WNOWAIT)
    return killed


def _kill_session(session: int) -> list[psutil.Process]:
    """What is left of the session: without a subreaper its orphans hang below init."""

    def look() -> list[psutil.Process]:
        return [member for member in psutil.process_iter() if member.pid != session and _session_of(member.pid) == session]

    return _kill_until_none(look)


def _kill_until_none(look: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    killed: dict[int, psutil.Process] = {}
    for _ in range(_LOOKS):
        found = [process for process in look() if not _is_dead(process)]
        if not found:
            break
        for process in found:
            killed[process.pid] = process
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process.kill()  # psutil compares the start time first
    return list(killed.values())


def _await_death(killed: list[psutil.Process]) -> None:
    """Until all are dead, a second at most; those that became our children (a subreaper's) are reaped."""
    pause = threading.Event()
    for _ in range(_DEATH_LOOKS):
        if all(_is_dead(process) for process in killed):
            break
        pause.wait(0.005)
    for process in killed:
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.is_running() and process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return 0


def _is_dead(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
