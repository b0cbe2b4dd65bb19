"""Ending processes: by pidfd, and whole trees where no cgroup helps.

Without cgroups the daemon and every worker are child subreapers (prctl(2)), so nothing that a worker starts
escapes to init: descendants of a live worker hang below it, orphans of a dead one below the daemon.
``killpg`` would miss whatever called setsid (T45).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

_PR_SET_CHILD_SUBREAPER = 36
# struct pidfd_info (include/uapi/linux/pidfd.h): the mask, cgroup and ten ids, the exit code.
_PIDFD_INFO = struct.Struct("=Q8x44xi")
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11
#: Present in the environment of every process of a worker, unless the user's code removed it.
WORKER_VARIABLE = "REMOTED_WORKER_ID"
_STRAY_SECONDS = 2.0
_DEAD = ("Z", "X", "x")
#: Dead children by pid, and when they were first seen dead.
_seen_dead: dict[int, float] = {}


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended: an exit code or a signal; neither is known of a process that was not our child."""

    code: int | None = None
    signal: int | None = None

    def describe(self) -> str:
        if self.signal is not None:
            return f"was killed by {signal_name(self.signal)}"
        if self.code is not None:
            return f"exited with code {self.code}"
        return "ended (its exit status is unknown)"


def signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def become_subreaper() -> None:
    """Make orphaned descendants our children. Raises OSError where the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a child subreaper")


def reap(pidfd: int) -> ExitStatus:
    """Collect a dead child; blocks until it is dead. Of somebody else's child the status is known once that has collected it (Linux 6.15)."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return collected(pidfd) or ExitStatus()
    if result is None:
        return ExitStatus()
    if result.si_code == os.CLD_EXITED:
        return ExitStatus(code=result.si_status)
    return ExitStatus(signal=result.si_status)


def collected(pidfd: int) -> ExitStatus | None:
    """How somebody else's child ended, if that has collected it and the kernel still tells (PIDFD_INFO_EXIT)."""
    info = bytearray(_PIDFD_INFO.size)
    _PIDFD_INFO.pack_into(info, 0, _PIDFD_INFO_EXIT, 0)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, status = _PIDFD_INFO.unpack(info)
    if not mask & _PIDFD_INFO_EXIT:
        return None
    return ExitStatus(signal=os.WTERMSIG(status)) if os.WIFSIGNALED(status) else ExitStatus(code=os.WEXITSTATUS(status))


def send(pidfd: int, number: int) -> None:
    """Signal by pidfd: a recycled pid is never hit (T07)."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def descendants(pid: int, younger_than: float | None = None) -> list[psutil.Process]:
    """Live descendants of ``pid``; with ``younger_than`` (seconds since boot) only those started since."""
    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in found if younger_than is None or started_at(process.pid) >= younger_than]


def children_by_parent() -> dict[int, list[int]]:
    """Everybody on this host at this moment: one look for the trees of many."""
    found: dict[int, list[int]] = {}
    for pid in psutil.pids():
        if len(fields := _stat(pid)) > 1:
            found.setdefault(int(fields[1]), []).append(pid)
    return found


def tree(pid: int, children: Mapping[int, list[int]]) -> list[int]:
    """Everybody below ``pid``."""
    found = list(children.get(pid, ()))
    for child in found:
        found += children.get(child, ())
    return found


def living_since(pid: int) -> float | None:
    """When a process began, in seconds since boot; None for the dead, reaped or not."""
    fields = _stat(pid)
    return int(fields[19]) / os.sysconf("SC_CLK_TCK") if fields and fields[0] not in _DEAD else None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name (proc(5)); none when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace", buffering=512) as file:
            return file.read().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def started_at(pid: int) -> float:
    """When the process began, in seconds since boot, to 10 ms; 0 if it is gone.

    Not psutil's ``create_time``: that adds the boot time of /proc/stat, which is whole seconds, so a child may
    look a second older than its parent's wall clock.
    """
    return ticks_of(pid) / os.sysconf("SC_CLK_TCK")


def ticks_of(pid: int) -> int:
    """The same as the kernel says it (field 22 of proc(5)); 0 if it is gone."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def kill_descendants(pid: int, younger_than: float | None = None, rounds: int = 20) -> int:
    """KILL descendants until a look finds none; a fork may slip past one look, not past all. Returns how many."""
    killed = 0
    for _ in range(rounds):
        found = [process for process in descendants(pid, younger_than) if not _is_zombie(process)]
        if not found:
            return killed
        killed += kill_all(found)
    return killed


def kill_orphans(worker_id: str, session: int, younger_than: float = 0.0, rounds: int = 20, of: int | None = None) -> int:
    """KILL what a worker's processes left below this daemon (a subreaper): its orphans and their descendants.

    ``session`` is the worker's pid, which is the session of everything that did not call setsid. ``of``: nobody else's processes are
    looked into; who reads an environment may wait as long as that process likes (``orphans``).
    """
    killed = 0
    for _ in range(rounds):
        children = [child for child in psutil.Process().children() if of is None or _uid(child) == of]
        roots = [child for child in children if _belongs(child, worker_id) and child.pid != session and started_at(child.pid) >= younger_than]
        if not roots:
            break
        killed += kill_all([process for root in roots for process in (root, *root.children(recursive=True))])
        for root in roots:
            _collect(root.pid)
    collect_strays(session)
    return killed


def collect_strays(session: int) -> None:
    """Reap what was left to us dead: of this session at once, else what nobody has waited for in a while.

    Workers and helpers are waited for by whoever started them, within moments; a child that a body forked and that
    called setsid looks the same, but nobody waits for it.
    """
    now = time.monotonic()
    dead = {child.pid for child in psutil.Process().children() if child.pid != session and _is_zombie(child)}
    for pid in [pid for pid in _seen_dead if pid not in dead]:
        _seen_dead.pop(pid, None)
    for pid in dead:
        if _session(pid) == session or now - _seen_dead.setdefault(pid, now) > _STRAY_SECONDS:
            _collect(pid)


def _belongs(process: psutil.Process, worker_id: str) -> bool:
    try:
        return not _is_zombie(process) and process.environ().get(WORKER_VARIABLE) == worker_id
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _uid(process: psutil.Process) -> int:
    """-1: it is gone."""
    try:
        return int(process.uids().real)
    except psutil.NoSuchProcess:
        return -1


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _collect(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def kill_all(processes: list[psutil.Process]) -> int:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # psutil compares the start time first
    psutil.wait_procs(processes, timeout=1)
    return len(processes)
