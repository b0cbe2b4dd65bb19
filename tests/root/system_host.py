"""The system's daemon in a folder of its own, and real users who call it.

Two of the users have no account (60001, 60002); those of ``accounts`` are made with useradd and removed afterwards.
Daemon and users run on an environment that is root's and readable by everybody (``tests/root/setup.sh``).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from remoted.paths import system_paths
from tests.harness import ROOT, Run, wait_until

#: Debian's trees and the parts of a computer in software.
TREES = Path(os.environ.get("REMOTED_TEST_TREES") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remoted-tests")
SHARED = Path(os.environ.get("REMOTED_TEST_SHARED", "/var/lib/remoted-tests"))
_START_SECONDS = 30.0
#: Two of the users have no account.
UNKNOWN = "[users]\nallow_unknown_uids = true\n"


@dataclass
class User:
    """Somebody on the host, with a home that nobody else may enter."""

    host: SystemHost
    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.host.prefix / "home" / self.name

    @property
    def environ(self) -> dict[str, str]:
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(self.home),
            "USER": self.name,
            "REMOTED_SOCKET": str(self.host.sockets),
            "PYTHONPATH": str(self.host.library),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "error",
            **self.variables,
        }

    def popen(self, program: str, *arguments: str, python: str | None = None, **environ: str) -> subprocess.Popen[str]:
        path, new = self.home / "script.py", self.home / "script.py.new"
        new.write_text(textwrap.dedent(program), encoding="utf-8")
        os.chown(new, self.uid, self.gid)
        new.replace(path)  # the one before may just be read
        return self.popen_command([python or str(self.host.python), str(path), *arguments], **environ)

    def popen_command(self, command: list[str], **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env={**self.environ, **environ},
            cwd=self.home,
            user=self.uid,
            group=self.gid,
            extra_groups=list(self.groups),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, program: str, *arguments: str, check: bool = True, python: str | None = None, **environ: str) -> Run:
        """Run a script as this user to its end."""
        return self._finish(self.popen(program, *arguments, python=python, **environ), check)

    def remotectl(self, *arguments: str, check: bool = True) -> Run:
        return self._finish(self.popen_command([str(self.host.python), "-c", "from remoted.cli import main; main()", *arguments]), check)

    def _finish(self, process: subprocess.Popen[str], check: bool) -> Run:
        try:
            out, err = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"the script hangs:\n{out}\n{err}\n{self.host.log()}") from None
        result = Run(process.returncode, out, err)
        assert not check or result.code == 0, f"exit code {result.code}\n{out}\n{err}\n--- daemon\n{self.host.log()}"
        return result


class SystemHost:
    """One host with many users; its /run, /var and /etc lie below ``prefix``."""

    def __init__(self, prefix: Path, config: str = UNKNOWN) -> None:
        self.prefix = prefix
        self.sockets = prefix / "run" / "remoted"
        self.state = prefix / "var" / "lib" / "remoted"
        self.library = prefix / "lib"
        self.python = prefix / "venv" / "bin" / "python"
        self.process: subprocess.Popen[bytes] | None = None
        for folder in ("run", "var/lib", "etc/remoted", "home", "lib"):
            _make(prefix / folder)
        (prefix / "etc/remoted/config.toml").write_text(config, encoding="utf-8")
        self._install()

    def _install(self) -> None:
        assert SHARED.joinpath("venv/bin/python").exists(), "run `make test-root`: it makes what the system's daemon runs on"
        ignore = shutil.ignore_patterns("__pycache__")
        packages = next(SHARED.glob("venv/lib/python3.*/site-packages"))
        shutil.copytree(ROOT / "client" / "remoted_client", self.library / "remoted_client", ignore=ignore)
        shutil.copytree(packages / "cloudpickle", self.library / "cloudpickle", ignore=ignore)
        # The daemon's own environment: the shared one, and this checkout's code.
        subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", str(self.prefix / "venv")], check=True)
        own = next(self.prefix.glob("venv/lib/python3.*/site-packages"))
        for name in ("remoted", "client/remoted_client"):
            shutil.copytree(ROOT / name, own / Path(name).name, ignore=ignore)
        (own / "shared.pth").write_text(f"{packages}\n", encoding="ascii")
        (self.prefix / "venv/bin/uv").symlink_to(SHARED / "venv/bin/uv")
        subprocess.run(["chmod", "-R", "go=u-w", str(self.prefix / "venv"), str(self.library)], check=True)

    # -- users ---------------------------------------------------------------------------------------------

    def user(self, name: str, uid: int, gid: int | None = None, groups: tuple[int, ...] = (), **variables: str) -> User:
        """Somebody with a home of mode 0700."""
        user = User(self, name, uid, uid if gid is None else gid, groups, variables)
        if not user.home.exists():
            user.home.mkdir(mode=0o700)
            os.chown(user.home, user.uid, user.gid)
        return user

    # -- the daemon ----------------------------------------------------------------------------------------

    def start(self, *arguments: str, wrapper: tuple[str, ...] = (), **environ: str) -> SystemHost:
        """``wrapper``: a program that is executed first, with the daemon's command line."""
        with (self.prefix / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*wrapper, str(self.python), "-I", "-m", "remoted", "--system", "--prefix", str(self.prefix), *arguments],
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **environ},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self.answers, _START_SECONDS, lambda: f"the daemon did not start:\n{self.log()}")
        return self

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}:\n{self.log()}"
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.connect(str(self.sockets / "data.sock"))
            return True
        return False

    def stop(self) -> None:
        """As ``remotectl stop --now`` does; no process may be left."""
        if self.process is None or self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(20)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, f"processes outlived the daemon: {alive}\n{self.log()}"

    def log(self) -> str:
        path = self.prefix / "daemon.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def close(self) -> None:
        try:
            self.stop()
        finally:
            if self.process is not None and self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            for place in Path("/sys/fs/cgroup").glob(f"**/{system_paths(self.prefix).group_name}"):
                for group in (*place.iterdir(), place):
                    with contextlib.suppress(OSError):
                        group.rmdir()
            shutil.rmtree(self.prefix, ignore_errors=True)


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def system_host(config: str = UNKNOWN) -> Iterator[SystemHost]:
    """A host in a short path, readable by everybody, removed afterwards."""
    prefix = Path(tempfile.mkdtemp(prefix="rsys-"))
    prefix.chmod(0o755)
    old = os.umask(0o022)
    try:
        made = SystemHost(prefix, config)
    finally:
        os.umask(old)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def accounts(*names: str) -> Iterator[list[pwd.struct_passwd]]:
    """Real accounts for as long as the test runs."""
    made: list[str] = []
    try:
        for name in names:
            subprocess.run(["useradd", "--no-create-home", "--user-group", "--shell", "/bin/sh", name], check=True, capture_output=True)
            made.append(name)
        yield [pwd.getpwnam(name) for name in names]
    finally:
        for name in made:
            subprocess.run(["userdel", name], check=False, capture_output=True)


if os.geteuid() != 0:
    sys.stderr.write("the system's daemon needs root: its tests are skipped\n")
