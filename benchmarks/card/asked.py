"""A process that answers each line with a line of JSON, from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


class Asked:
    """``python PROGRAM ARGUMENTS``; its first line, which it says by itself, is ``hello``."""

    def __init__(self, program: str, *arguments: str, **as_whom: Any) -> None:
        """``as_whom``: what ``Popen`` takes."""
        self.process = subprocess.Popen(
            [sys.executable, program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **as_whom
        )
        self.pid = self.process.pid
        self.hello = self._read()

    def ask(self, line: str) -> dict[str, Any]:
        self.begin(line)
        return self._read()

    def begin(self, line: str) -> None:
        """Without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _read(self) -> dict[str, Any]:
        """One that has died says so."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        if line := self.process.stdout.readline():
            found: dict[str, Any] = json.loads(line)
            return found
        return {"died": self.process.wait(), "stderr": self.process.stderr.read()[-600:]}
