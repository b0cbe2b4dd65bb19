"""README's examples are pasted into a script and run as they stand."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.fakes.nvml import Board, build_library
from tests.fakes.wheels import make_wheel
from tests.harness import ROOT, Host, host

README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST, GPU, *_ = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
TORCH = "class cuda:\n    @staticmethod\n    def get_device_name():\n        return 'a card'\n"


def test_the_first_example_runs_on_any_host_and_starts_the_daemon_by_itself(bare_host: Host) -> None:
    try:
        done = bare_host.run(bare_host.write("your_script.py", FIRST))

        printed = done.out.splitlines()
        assert [line for line in printed if not line.startswith("squaring")] == ["49", "[0, 1, 4, 9, 16, 25, 36, 49, 64, 81]"]
        assert sum(line.startswith("squaring") for line in printed) == 11
    finally:
        bare_host.run("import subprocess, sys; subprocess.run([sys.executable, '-c', 'from remoted.cli import main; main()', 'stop', '--now'], check=True)")


def test_the_example_with_a_gpu_runs_where_there_is_one(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    board.add_gpu("NVIDIA GeForce RTX 3090")
    board.write()
    wheels = tmp_path / "wheels"
    make_wheel(wheels, "torch", "2.1.0", {"torch": TORCH})
    with host(f'[gpu]\nnvml_library = "{build_library(tmp_path)}"\n[environments]\nwheel_folders = ["{wheels}"]\noffline = true\n') as made:
        made.start(REMOTED_FAKE_BOARD=os.fspath(board.path))
        done = made.run(made.write("your_script.py", GPU))
    assert done.out.splitlines()[-1] == "{'device': 'a card'}"


def test_the_example_with_a_gpu_says_what_is_missing_where_there_is_none(shared_daemon: Host) -> None:
    done = shared_daemon.run(shared_daemon.write("your_script.py", GPU), check=False)

    assert done.code == 1
    assert "NoMatchingGPU" in done.err


@pytest.mark.parametrize("path", re.findall(r"`(systemd/[\w./-]+)`|cp (systemd/[\w./-]+)", README))
def test_files_that_the_readme_names_are_there(path: tuple[str, str]) -> None:
    assert (ROOT / "".join(path)).is_file()


def test_the_users_unit_runs_the_daemon_of_the_environment_that_the_readme_makes() -> None:
    [made] = re.findall(r"^python3 -m venv ~/(\S+) && \. ", README, re.MULTILINE)
    unit = (ROOT / "systemd/user/remoted.service").read_text(encoding="utf-8")

    assert f"ExecStart=%h/{made}/bin/remoted --user\n" in unit
