"""Every path that the daemon makes, and the check that nobody else could have made it.

The system's daemon keeps state in /var/lib/remoted, sockets in /run/remoted and reads /etc/remoted/config.toml. User mode keeps state in ``$XDG_STATE_HOME/remoted`` and sockets in ``$XDG_RUNTIME_DIR/remoted``; without a
runtime directory a private folder in the temporary directory serves (MECHANISMS 7). The client repeats
``socket_directory`` in its own words (it may not import this package); a test compares the two.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from remoted.errors import StartupError

#: sockaddr_un.sun_path holds 108 bytes with its NUL (unix(7)).
SUN_PATH_BYTES = 107
_REMOTE_FILESYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "lustre", "gpfs", "afs"})


@dataclass(frozen=True, slots=True)
class Paths:
    """The folders of one daemon; everything else is derived from these three."""

    state: Path
    sockets: Path
    config: Path
    #: Do many users come in through the sockets and run what lies in ``runtime``?
    is_shared: bool = False

    @property
    def api_socket(self) -> Path:
        return self.sockets / "api.sock"

    @property
    def data_socket(self) -> Path:
        return self.sockets / "data.sock"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def socket_lock(self) -> Path:
        return self.sockets / "lock"

    @property
    def database(self) -> Path:
        return self.state / "remoted.sqlite3"

    @property
    def redo(self) -> Path:
        return self.state / "redo"

    @property
    def drain(self) -> Path:
        """It is there while the daemon is drained."""
        return self.state / "drain.json"

    @property
    def contents(self) -> Path:
        return self.state / "contents"

    @property
    def secrets(self) -> Path:
        return self.state / "secrets"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def outcomes(self) -> Path:
        return self.state / "outcomes"

    @property
    def runtime(self) -> Path:
        return self.state / "runtime"

    @property
    def environments(self) -> Path:
        return self.state / "environments"

    @property
    def daemon_log(self) -> Path:
        return self.state / "daemon.log"

    @property
    def group_name(self) -> str:
        """Of the cgroup that holds the workers': a second daemon, with another state, has one of its own."""
        usual = self.state == Path("/var/lib/remoted")
        return "remoted" if usual else f"remoted-{hashlib.sha256(os.fsencode(self.state)).hexdigest()[:8]}"

    @property
    def socket_mode(self) -> int:
        """Where many users come in, the peer's uid decides everything."""
        return 0o666 if self.is_shared else 0o600

    def create(self) -> None:
        """Make the folders, mode 0700 but for what others must reach. Raises StartupError if one is somebody else's."""
        own_directory(self.state, 0o711 if self.is_shared else 0o700)
        own_directory(self.sockets, 0o755 if self.is_shared else 0o700)
        own_directory(self.runtime, 0o755 if self.is_shared else 0o700)
        for folder in (self.contents, self.secrets, self.logs, self.outcomes, *(() if self.is_shared else (self.environments,))):
            own_directory(folder)
        if len(os.fsencode(self.api_socket)) + 1 > SUN_PATH_BYTES:
            raise StartupError(f"cannot listen on {self.api_socket}: the path is longer than {SUN_PATH_BYTES} bytes; set REMOTED_SOCKET to a shorter directory")


def own_directory(folder: Path, mode: int = 0o700) -> None:
    """Create ``folder``, or check that it is ours, and close it to others as far as ``mode`` says."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StartupError(f"cannot use {folder}: it is not a directory of uid {os.geteuid()}; remove it or choose another")
    if stat.S_IMODE(found.st_mode) & 0o077 != mode & 0o077:
        folder.chmod(mode)


def system_paths(prefix: Path) -> Paths:
    """The folders of the system's daemon; ``prefix`` is / but in tests."""
    return Paths(state=prefix / "var/lib/remoted", sockets=prefix / "run/remoted", config=prefix / "etc/remoted/config.toml", is_shared=True)


def user_paths(environ: dict[str, str]) -> Paths:
    """The folders of a user-mode daemon, from the XDG variables and REMOTED_SOCKET."""
    home = Path(environ.get("HOME") or "/")
    state = _xdg(environ, "XDG_STATE_HOME", home / ".local" / "state") / "remoted"
    config = _xdg(environ, "XDG_CONFIG_HOME", home / ".config") / "remoted" / "config.toml"
    if filesystem_type(state) in _REMOTE_FILESYSTEMS:
        state = Path("/var/tmp") / f"remoted-{os.geteuid()}"  # SQLite's locks do not hold on these (MECHANISMS 7)
    return Paths(state=state, sockets=socket_directory(environ), config=config)


def _xdg(environ: dict[str, str], name: str, default: Path) -> Path:
    value = environ.get(name, "")
    return Path(value) if value.startswith("/") else default


def socket_directory(environ: dict[str, str]) -> Path:
    """REMOTED_SOCKET names the directory of the two sockets; else the runtime directory; else a private one."""
    if named := environ.get("REMOTED_SOCKET"):
        return Path(named)
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "remoted"
    return Path(tempfile.gettempdir()) / f"remoted-{os.geteuid()}"


def filesystem_type(path: Path) -> str:
    """The type of the file system that holds ``path`` (or its nearest existing ancestor), as in /proc/self/mounts."""
    target = os.path.realpath(path)
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, fstype, *_ = line.split(" ")
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, fstype
    return kind
