"""docs/threat-model.md names a test, or the reason for none, for every threat; the tests it names exist."""

from __future__ import annotations

import re

from tests.harness import ROOT

THREATS = [f"T{number:02}" for number in range(1, 65)]
WITHOUT = ("does not apply because ", "no test yet")
ROW = re.compile(r"^\| (T\d\d) [^|]+ \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)

ROWS = ROW.findall((ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8"))


def _tests() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found.update(re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE))
    return found


def test_every_threat_has_one_row_in_order() -> None:
    assert [threat for threat, _ in ROWS] == THREATS


def test_every_row_names_tests_or_the_reason_for_none() -> None:
    for threat, shown in ROWS:
        assert re.fullmatch(r"(`test_\w+` ?)+", shown) or shown.startswith(WITHOUT), (threat, shown)


def test_the_tests_that_are_named_exist() -> None:
    named = {name for _, shown in ROWS for name in re.findall(r"`(test_\w+)`", shown)}

    assert named - _tests() == set()
    assert len(named) > 60


def test_a_test_that_carries_the_id_of_a_threat_is_not_denied() -> None:
    """A row that says "no test" is out of date once there is one."""
    carried = {f"T{number}" for name in _tests() for number in re.findall(r"^test_t(\d\d)_", name)}
    denied = {threat for threat, shown in ROWS if shown.startswith(WITHOUT)}

    assert denied & carried == set()
    assert carried <= set(THREATS)
