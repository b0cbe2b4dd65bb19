"""Finding the daemon: the system's, else one's own, which is started if need be (MECHANISMS 7)."""

from __future__ import annotations

import importlib.util
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time

from remoted_client import context
from remoted_client.errors import DaemonUnreachable
from remoted_client.printed import echo

#: Where the system's daemon listens; root's folder, so nobody else can put sockets there.
SYSTEM_DIRECTORY = "/run/remoted"
#: `remotectl install` puts it there, `uninstall` and `systemctl disable` take it away: root's folder, which everybody may read.
SYSTEM_UNIT = "/etc/systemd/system/sockets.target.wants/remoted.socket"
_START_SECONDS = 30.0
#: A system's daemon that restarts is back sooner.
_RESTART_SECONDS = 10.0
#: A restart that goes well takes less: nobody hears of it.
SILENCE_SECONDS = 3.0
#: In the sentence of a daemon that found the lock taken (``remoted/app.py``).
_OTHER_DAEMON = "another daemon"
#: The other one may be starting, or about to end; one that is still there after these is there to stay.
_REFUSALS = 3


def socket_directory() -> str:
    """REMOTED_SOCKET names the directory of the two sockets; else the system's daemon has them, also where it is enabled and away; else one's own.

    One's own are in the runtime directory, or in a private one.
    """
    if named := os.environ.get("REMOTED_SOCKET"):
        return named
    if os.path.exists(os.path.join(SYSTEM_DIRECTORY, "data.sock")) or is_installed():
        return SYSTEM_DIRECTORY
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(runtime, "remoted")
    return os.path.join(tempfile.gettempdir(), f"remoted-{os.geteuid()}")


def is_installed() -> bool:
    """Is there a daemon for everybody by its administrator's will, whether or not it runs? Nobody goes past it with one of their own (decision 0091)."""
    return os.path.isfile(SYSTEM_UNIT)  # one that is masked leads to /dev/null


def connect(name: str = "data.sock") -> socket.socket:
    """A connection to a daemon that is root's or ours. Raises OSError, or DaemonUnreachable for a stranger's (T08)."""
    folder = socket_directory()
    path = os.path.join(folder, name)
    trusted = (0,) if folder == SYSTEM_DIRECTORY else (0, os.geteuid())
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
        _, uid = _peer(sock)
        if uid not in trusted:
            raise DaemonUnreachable(f"cannot trust the daemon at {path}: it runs as uid {uid}; check REMOTED_SOCKET")
    except BaseException:
        sock.close()
        raise
    return sock


def _peer(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that listens."""
    pid, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def await_word(sock: socket.socket) -> None:
    """Tell who waits for the first word of a daemon that says none: systemd holds its sockets whether or not it can start."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    if not context.in_worker and not poller.poll(SILENCE_SECONDS * 1000):
        echo.show(2, f"remoted: the daemon in {socket_directory()} takes connections and has not answered yet, waiting ...; {where_to_look()}\n")


def unreachable(path: str, error: OSError, otherwise: str) -> str:
    """Why nobody is reached at a socket, and who can change that. ``otherwise``: what to do where there is simply no daemon of one's own."""
    folder = os.path.dirname(path)
    mend = "an administrator mends that with `systemctl restart remoted.socket remoted`"
    if isinstance(error, PermissionError):
        closed = f"cannot reach the daemon at {path}: you may not open it"
        return f"{closed}, so it is closed to you or its folder is; {mend if folder == SYSTEM_DIRECTORY else 'its owner can change that (chmod), and REMOTED_SOCKET names another one'}"
    if not isinstance(error, (FileNotFoundError, ConnectionRefusedError, NotADirectoryError)):
        return f"cannot reach the daemon at {path}: {error}; check REMOTED_SOCKET"
    if folder != SYSTEM_DIRECTORY:
        return f"no daemon answers at {path}: {otherwise}"
    if is_installed():
        return f"no daemon answers at {path}: the system's daemon is installed here and does not run, or its sockets are gone; {mend}"
    return f"no daemon answers at {path}: the system's daemon does not run; an administrator starts it with `systemctl start remoted`"


def where_to_look() -> str:
    """The end of a sentence about a daemon that does not answer."""
    if socket_directory() == SYSTEM_DIRECTORY:
        return "`systemctl status remoted` and `journalctl -u remoted` say why"
    return f"{_log_path()} may say why"


def connect_or_start() -> socket.socket:
    """As ``connect``, after starting the user's own daemon if none answers. Raises DaemonUnreachable."""
    try:
        return connect()
    except (FileNotFoundError, ConnectionRefusedError):
        pass
    except DaemonUnreachable:
        raise
    except OSError as error:
        raise DaemonUnreachable(unreachable(_data_socket(), error, "")) from error
    if context.in_worker:
        return _wait_for(None)
    if socket_directory() == SYSTEM_DIRECTORY:
        return _wait_for(None, _RESTART_SECONDS)
    return _wait_for(_start())


def _start() -> subprocess.Popen[bytes]:
    """The daemon, in a session of its own, so that it outlives this script."""
    if importlib.util.find_spec("remoted") is None or importlib.util.find_spec("aiohttp") is None:
        raise DaemonUnreachable(
            f"no daemon answers in {socket_directory()}, and none can be started: {sys.executable} lacks its packages; run: {sys.executable} -m pip install '.[daemon]' in the folder of remoted"
        )
    try:
        return _spawn()
    except OSError as error:
        raise DaemonUnreachable(f"cannot start your own daemon: {error}") from error


def _spawn() -> subprocess.Popen[bytes]:
    folder = _state_folder()
    os.makedirs(folder, mode=0o700, exist_ok=True)
    with open(os.path.join(folder, "daemon.log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "remoted", "--user", "--idle-exit"] if sys.version_info >= (3, 11) else [sys.executable, "-m", "remoted", "--user", "--idle-exit"],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=True,
        )


def _data_socket() -> str:
    return os.path.join(socket_directory(), "data.sock")


def _state_folder() -> str:
    state = os.environ.get("XDG_STATE_HOME", "")
    base = state if state.startswith("/") else os.path.join(os.environ.get("HOME", "/"), ".local", "state")
    return os.path.join(base, "remoted")


def _wait_for(process: subprocess.Popen[bytes] | None, seconds: float = _START_SECONDS) -> socket.socket:
    deadline = time.monotonic() + seconds
    pause, refusals, problem = 0.01, 0, OSError()
    while time.monotonic() < deadline:
        try:
            sock = connect()
        except (FileNotFoundError, ConnectionRefusedError) as error:
            problem = error
            if process is not None and process.poll() is not None:
                refusals += 1
                process = _start_again(refusals)
            time.sleep(pause)
            pause = min(0.1, pause * 1.5)
            continue
        if process is not None:
            if _peer(sock)[0] == process.pid:
                sys.stderr.write(f"remoted: started your own daemon (pid {process.pid}); `remotectl status` shows it\n")
            process.returncode = 0  # it is not ours to wait for
        return sock
    if socket_directory() == SYSTEM_DIRECTORY:
        raise DaemonUnreachable(f"{unreachable(_data_socket(), problem, '')}; {where_to_look()}; REMOTED_SOCKET names the folder of a daemon of your own, if you are to have one")
    raise DaemonUnreachable(f"cannot reach a daemon in {socket_directory()}: it did not start within {_START_SECONDS:g} s; see {_log_path()}")


def _start_again(refusals: int) -> subprocess.Popen[bytes]:
    """The one that we started has ended. If another was in its way, that one starts, or ends, just now."""
    words = _last_words()
    if _OTHER_DAEMON not in words:
        raise DaemonUnreachable(f"your own daemon does not start: {words or 'it does not say why'}; see {_log_path()}")
    if refusals >= _REFUSALS:
        raise DaemonUnreachable(f"no daemon answers in {socket_directory()}, and none {words.replace('cannot start', 'can be started there', 1)}; {_way_out()}")
    time.sleep(0.5 * refusals)
    return _start()


def _way_out() -> str:
    if os.environ.get("REMOTED_SOCKET"):
        return "unset REMOTED_SOCKET to use that daemon, or set XDG_STATE_HOME to another folder as well to have a second one"
    return "set REMOTED_SOCKET to the folder of its sockets"


def _last_words() -> str:
    """The sentence with which a daemon refused to start (``remoted/__main__.py``)."""
    try:
        with open(os.path.join(_state_folder(), "daemon.log"), "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 4096))
            lines = log.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("remoted: ") for line in reversed(lines) if line.startswith("remoted: ")), lines[-1] if lines else "")


def _log_path() -> str:
    return os.path.join(_state_folder(), "daemon.log")
