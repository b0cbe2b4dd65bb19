"""A daemon over the fake driver: a real libnvidia-ml.so.1 that reads its cards from a board file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.nvml import Board, build_library
from tests.harness import Host, host


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("fake-driver"))


class GpuHost:
    """A host, its board, and scripts on it. Cards are added before ``start``, or later with ``board.write``."""

    def __init__(self, plain: Host, driver: Path, settings: str = "") -> None:
        self.host = plain
        self.board = Board(plain.folder / "board")
        plain.config.write_text(f'{settings}\n[gpu]\nnvml_library = "{driver}"\npoll_seconds = 0.2\nnvml_deadline_seconds = 1.0\n', encoding="utf-8")

    def look(self) -> dict[str, Any]:
        """What ``remotectl gpus`` would show; asking makes the daemon look at the board if its facts are old."""
        answer = subprocess.run(["curl", "-s", "--unix-socket", str(self.host.sockets / "api.sock"), "http://x/v1/gpus"], capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(answer.stdout)
        return found

    def start(self) -> GpuHost:
        self.board.write()
        self.host.start(REMOTED_FAKE_BOARD=str(self.board.path))
        return self


@pytest.fixture
def gpu_host(fake_driver: Path) -> Iterator[GpuHost]:
    with host() as plain:
        yield GpuHost(plain, fake_driver)
