"""A real daemon in folders of its own, and scripts run against it as a user would run them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
_START_SECONDS = 30.0


class Host:
    """One user's view of one machine: home, state, sockets, configuration, and at most one daemon."""

    def __init__(self, folder: Path, config: str = "") -> None:
        self.folder = folder
        self.home = folder / "home"
        self.sockets = folder / "s"
        self.state = folder / "state"
        self.project = folder / "project"
        for path in (self.home, self.state, self.project):
            path.mkdir(parents=True)
        self.config = folder / "config.toml"
        self.config.write_text(config, encoding="utf-8")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environ(self) -> dict[str, str]:
        """A plain user's environment: nothing of the test runner's but the way to the code."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "SSL_CERT_FILE", "UV_CACHE_DIR", "TMPDIR") if name in os.environ}
        return {
            **kept,
            "HOME": str(self.home),
            "USER": "tester",
            "XDG_STATE_HOME": str(self.state),
            "XDG_CONFIG_HOME": str(self.folder / "xdg"),
            "REMOTED_SOCKET": str(self.sockets),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "error",
        }

    # -- the daemon ----------------------------------------------------------------------------------------

    def start(self, *arguments: str, **environ: str) -> Host:
        """Start the daemon and wait until it answers."""
        assert self.process is None or self.process.poll() is not None
        for name in ("data.sock", "api.sock"):
            (self.sockets / name).unlink(missing_ok=True)
        with (self.folder / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "remoted", "--user", "--config", str(self.config), *arguments],
                env={**self.environ, **environ, "PYTHONWARNINGS": "default"},
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
        """As ``remotectl stop --now`` does; the daemon must end by itself and leave no process behind."""
        if self.process is None or self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(15)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, f"processes outlived the daemon: {alive}\n{self.log()}"

    def terminate(self) -> None:
        """As ``kill PID`` and ``remotectl stop`` do: what runs goes on."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(15)

    def kill(self) -> None:
        """SIGKILL: no last words."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(15)

    def log(self) -> str:
        path = self.folder / "daemon.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    # -- scripts -------------------------------------------------------------------------------------------

    def write(self, name: str, text: str) -> Path:
        """Whole or not at all: a process that was started a moment ago may just be reading what it was before."""
        path = self.project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        new.write_text(textwrap.dedent(text), encoding="utf-8")
        new.replace(path)
        return path

    def popen(self, script: str | Path, *arguments: str, python: str = sys.executable, **environ: str) -> subprocess.Popen[str]:
        """Start a script (its text, or a path) as the user would."""
        path = script if isinstance(script, Path) else self.write("script.py", script)
        return subprocess.Popen(
            [python, str(path), *arguments],
            env={**self.environ, **environ},
            cwd=self.project,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str | Path, *arguments: str, timeout: float = 60, check: bool = True, **environ: str) -> Run:
        """Run a script to its end; with ``check`` it must succeed."""
        process = self.popen(script, *arguments, **environ)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"the script hangs:\n{out}\n{err}\n{self.log()}") from None
        result = Run(process.returncode, out, err)
        assert not check or result.code == 0, f"exit code {result.code}\n{out}\n{err}\n--- daemon\n{self.log()}"
        return result

    def close(self) -> None:
        try:
            self.stop()
        finally:
            if self.process is not None and self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)


class Run:
    """How a script ended. ``json`` reads its last line."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out.strip().splitlines()[-1])


def wait_until(condition: Any, seconds: float, explain: Any = lambda: "it did not happen") -> None:
    """Something outside of this process becomes true; there is no event to wait for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.01)


@contextlib.contextmanager
def host(config: str = "") -> Iterator[Host]:
    """A host in a short path (sockets allow 107 bytes), removed afterwards."""
    made = Host(Path(tempfile.mkdtemp(prefix="rmt-")) / "h", config)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(made.folder.parent, ignore_errors=True)
