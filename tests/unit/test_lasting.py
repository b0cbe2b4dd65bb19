"""C09: which interpreter a call means that names one of our editions."""

from __future__ import annotations

from pathlib import Path

import pytest

from remoted.lasting import in_force, lasting


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """With one edition, which is in force."""
    (tmp_path / "remoted-k2xq0a1_").mkdir()
    (tmp_path / "remoted").symlink_to(tmp_path / "remoted-k2xq0a1_")
    return tmp_path / "remoted"


@pytest.mark.parametrize("edition", ["k2xq0a1_", "deleted0"])
def test_c09_the_interpreter_of_an_edition_is_the_one_in_force(prefix: Path, edition: str) -> None:
    assert lasting(f"{prefix}-{edition}/bin/python", prefix=prefix) == f"{prefix}/bin/python"


@pytest.mark.parametrize("other", ["/usr/bin/python3", "{}/bin/python", "{}-mine/bin/python", "{}-deleted0/../../tmp/bin/python", "{}-deleted0/lib/python", "{}-deleted0/bin/sh", "python"])
def test_c09_any_other_interpreter_is_itself(prefix: Path, other: str) -> None:
    assert lasting(other.format(prefix), prefix=prefix) == other.format(prefix)


def test_c09_without_an_installation_nothing_stands_for_another(tmp_path: Path) -> None:
    named = f"{tmp_path}/remoted-deleted0/bin/python"

    assert lasting(named, prefix=tmp_path / "remoted") == named


def test_c09_workers_of_two_editions_are_of_two_kinds(prefix: Path) -> None:
    before = in_force(f"{prefix}/bin/python", prefix=prefix)
    prefix.unlink()
    prefix.symlink_to(prefix.with_name("remoted-another0"))

    assert before == f"{prefix}-k2xq0a1_/bin/python"
    assert in_force(f"{prefix}/bin/python", prefix=prefix) == f"{prefix}-another0/bin/python"
    assert in_force("/usr/bin/python3", prefix=prefix) == "/usr/bin/python3"
