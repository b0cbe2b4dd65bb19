"""A function is itself in every run, and another one after an edit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remoted_client.codec import function_identity

ROOT = Path(__file__).resolve().parents[2]


def made(text: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {"__name__": "notebook"}
    exec(text, scope)
    function: Callable[..., Any] = scope["f"]
    return function


def digest(text: str) -> str:
    return function_identity(made(text))[2]


def test_module_and_name_are_given() -> None:
    assert function_identity(made("def f(): ..."))[:2] == ("notebook", "f")


def test_place_in_the_file_does_not_matter() -> None:
    assert digest("def f(x): return [y for y in x]") == digest("\n\n\ndef f(x): return [y for y in x]")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(): return 1", "def f(): return 2"),
        ("def f(): return 1", "def f(): return 1.0"),
        ("def f(): return 1", "def f(): return True"),
        ("def f(): return a", "def f(): return b"),
        ("def f(x): return 1", "def f(y): return 1"),
        ("def f(*x): return 1", "def f(**x): return 1"),
        ("def f(): return lambda: 1", "def f(): return lambda: 2"),
        ("def f(x): return x in {1, 2}", "def f(x): return x in {1, 3}"),
        ("def f():\n try: g()\n finally: h()", "def f():\n g()\n h()"),
        ("class f:\n def m(self): return 1", "class f:\n def m(self): return 2"),
    ],
)
def test_an_edit_makes_another_function(one: str, other: str) -> None:
    assert digest(one) != digest(other)


def test_it_is_the_same_in_two_processes_whatever_the_hash_seed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from remoted_client.codec import function_identity\n"
        "def f(x, y=frozenset('abc')):\n"
        "    return x in {'alpha', 'beta', 'gamma', 'delta', ('a', 'b')}\n"
        "class C:\n"
        "    def m(self): return {'p', 'q'} & {'r'}\n"
        "print(function_identity(f), function_identity(C))\n"
    )

    def run(seed: str) -> bytes:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "client")}
        return subprocess.run([sys.executable, script], env=environment, check=True, capture_output=True).stdout

    assert run("1") == run("2") != b""


def test_source_counts_where_it_can_be_had(tmp_path: Path) -> None:
    found = []
    for comment in ("one", "two"):
        path = tmp_path / f"{comment}.py"
        path.write_text(f"def f():\n    return 1  # {comment}\n")
        scope: dict[str, Any] = {}
        exec(compile(path.read_text(), str(path), "exec"), scope)
        found.append(function_identity(scope["f"])[2])

    assert found[0] != found[1]
