"""The last program that runs as root on the way to a user's: it becomes the user, proves it, and executes the user's program.

Run by ``becoming`` as ``python -I -S -B entry.py FD`` with an empty environment in ``/``; the orders are in a sealed
memfd, so nothing of them shows in a command line (T40). Standard library only. Up to the drop it opens nothing but
that memfd, files below /proc/self and the cgroup files that it is told; whatever a user's path leads to is first
touched by the user (T30).

Exit codes: 70 the change was not whole, and no code of the user's has run; 71 the program cannot be executed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

# include/uapi/linux/prctl.h, include/uapi/linux/keyctl.h
_PR_SET_NO_NEW_PRIVS = 38
_KEYCTL_JOIN_SESSION_KEYRING = 1
_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
# include/uapi/linux/bpf.h; what ``remoted.bpf`` is for the daemon
_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_BPF_PROG_ATTACH, _BPF_CGROUP_DEVICE, _BPF_F_ALLOW_MULTI = 8, 6, 2
_NOT_BECOME, _NOT_EXECUTED = 70, 71
_UNCHANGED = -1


def main(fd: int) -> NoReturn:
    """Become who the orders name and execute what they name."""
    try:
        orders = _read(fd)
        _forget_inheritance(orders)
        _enter_cgroups(orders["cgroups"])
        _end_together(orders["oom_groups"])
        if orders["device_rules"] is not None:
            _keep_devices(*orders["device_rules"])
        _become(orders["uid"], orders["gid"], orders["groups"])
        if orders["no_new_privileges"]:
            _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
        _leave_keyring()
    except BaseException as error:
        _give_up(_NOT_BECOME, f"cannot become the user: {type(error).__name__}: {error}")
    try:
        os.umask(orders["umask"])
        os.chdir(orders["cwd"])
        os.execve(orders["argv"][0], orders["argv"], orders["environ"])
    except BaseException as error:
        _give_up(_NOT_EXECUTED, f"cannot execute {orders['argv'][0]} as uid {orders['uid']}: {error}")


def _read(fd: int) -> dict[str, Any]:
    with open(fd, "rb") as file:
        file.seek(0)
        orders = json.load(file)
    assert isinstance(orders, dict)
    return orders


def _forget_inheritance(orders: dict[str, Any]) -> None:
    """Session, priority, limits, signals and descriptors of the daemon's are no user's business (T25, T26)."""
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    _write("/proc/self/oom_score_adj", "0")
    for number, soft, hard in orders["limits"]:
        _limit(number, soft, hard)
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):  # those that the C library keeps for itself
            signal.signal(signum, signal.SIG_DFL)  # ignored ones stay ignored across execve, and Python ignores SIGPIPE
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    kept = {0, 1, 2, *orders["keep"], *(orders["device_rules"] or ())[1:]}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _limit(number: int, soft: int, hard: int) -> None:
    """Without CAP_SYS_RESOURCE (in a container) root may only lower: then as much as it has."""
    try:
        resource.setrlimit(number, (soft, hard))
    except (ValueError, OSError):
        most = resource.getrlimit(number)[1]
        resource.setrlimit(number, (_lower(soft, most), _lower(hard, most)))


def _lower(one: int, other: int) -> int:
    finite = [value for value in (one, other) if value != resource.RLIM_INFINITY]
    return min(finite, default=resource.RLIM_INFINITY)


def _enter_cgroups(files: list[str]) -> None:
    for file in files:
        _write(file, str(os.getpid()))


def _end_together(files: list[str]) -> None:
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # a controller that systemd does not hand down
            _write(file, "1")


def _keep_devices(folder: str, program: int) -> None:
    """Before anything of the user's runs: a device that is open already stays usable (T47)."""
    group = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    words = b"".join(word.to_bytes(4, sys.byteorder) for word in (group, program, _BPF_CGROUP_DEVICE, _BPF_F_ALLOW_MULTI))
    _check(min(0, _libc().syscall(_SYS_BPF[os.uname().machine], _BPF_PROG_ATTACH, words, len(words))), "BPF_PROG_ATTACH")
    os.close(group)
    os.close(program)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _become(uid: int, gid: int, groups: list[int]) -> None:
    """In the one order that works, and then the proof: the ids are these, and the old ones are out of reach (T22, T24)."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3 or sorted(os.getgroups()) != sorted(groups):
        raise PermissionError(f"the ids are {os.getresuid()}, {os.getresgid()}, {os.getgroups()}")
    if uid == 0:
        return  # root's own functions, which the configuration allows
    _must_fail(lambda: os.setresuid(_UNCHANGED, 0, _UNCHANGED), "setresuid(0)")
    _must_fail(lambda: os.setgroups([*groups, 0]), "setgroups")
    if gid != 0:
        _must_fail(lambda: os.setresgid(_UNCHANGED, 0, _UNCHANGED), "setresgid(0)")
    left = _capabilities()
    if any(left.values()):
        raise PermissionError(f"capabilities are left: {left}")


def _must_fail(act: Any, name: str) -> None:
    try:
        act()
    except PermissionError:
        return
    raise PermissionError(f"{name} still works")


def _capabilities() -> dict[str, int]:
    """As bytes: a codec would have to be imported, from where the user may not be able to read."""
    with open("/proc/self/status", "rb") as file:
        lines = dict(line.split(b":", 1) for line in file if line.startswith(b"Cap"))
    return {name: int(lines[name.encode()], 16) for name in ("CapPrm", "CapEff", "CapAmb")}


def _leave_keyring() -> None:
    """A session keyring of its own: whoever possesses the daemon's could read what is in it (keyrings(7))."""
    number = _SYS_KEYCTL.get(os.uname().machine)
    if number is not None:
        _libc().syscall(number, _KEYCTL_JOIN_SESSION_KEYRING, None)  # a kernel without keyrings has none to leave


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, name: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{name} failed")


def _give_up(code: int, text: str) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"remoted: {text}\n".encode(errors="backslashreplace"))
    os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
