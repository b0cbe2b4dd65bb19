"""An environment with the client alone, as users of the system's daemon have: its commands say what they need, and where they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pip install .` leaves it, without the network."""
    folder = tmp_path_factory.mktemp("client") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python3.*/site-packages"))
    (packages / "checkout.pth").write_text(f"{ROOT}\n{ROOT / 'client'}\n", encoding="utf-8")
    return folder / "bin" / "python"


def run(python: Path, module: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-c", f"from {module} import main; main()", *arguments], env={**os.environ, **environ}, capture_output=True, text=True)


@pytest.mark.skipif(Path("/opt/remoted").exists(), reason="this host has a system's daemon, whose command would answer")
def test_c01_remotectl_says_what_it_lacks_where_the_client_is_alone(python: Path, tmp_path: Path) -> None:
    done = run(python, "remoted.cli", "ps", REMOTED_SOCKET=os.fspath(tmp_path))

    assert done.returncode == 1
    assert "the client alone is installed" in done.stderr
    assert "pip install '.[daemon]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_f07_a_script_is_served_by_the_interpreter_that_has_what_it_imports(python: Path) -> None:
    done = run(python, "remoted.cli", "serve", "app.py")

    assert done.returncode == 1
    assert "cannot serve a script by the host's remotectl" in done.stderr


def test_c01_status_needs_nothing_more_than_the_client(python: Path, tmp_path: Path) -> None:
    done = run(python, "remoted.cli", "status", REMOTED_SOCKET=os.fspath(tmp_path))

    assert done.returncode == 3
    assert "no daemon answers" in done.stderr


def test_c01_a_daemon_does_not_start_where_the_client_is_alone(python: Path) -> None:
    done = run(python, "remoted.__main__", "--user")

    assert done.returncode == 1
    assert "the client alone is installed" in done.stderr
    assert "Traceback" not in done.stderr
