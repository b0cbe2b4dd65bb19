"""F02: the public names are typed; mypy strict and pyright strict agree on ``tests/typing/reveal.py``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness import ROOT


@pytest.mark.parametrize("checker", [["mypy", "--strict"], ["pyright"]], ids=["mypy", "pyright"])
def test_f02_a_handle_of_every_kind_of_function_has_its_type(checker: list[str]) -> None:
    command = [sys.executable, "-m", *checker, "tests/typing/reveal.py"] if checker[0] == "mypy" else [sys.executable, "-m", "pyright"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
