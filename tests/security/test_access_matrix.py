"""T09: who may use which route, as a file that a reviewer reads; the table must equal it.

After a wanted change: ``python tests/security/test_access_matrix.py > tests/security/access_matrix.txt``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from remoted.access import Peer, admits, allows
from remoted.api.dispatch import find_route
from remoted.api.exchange import HttpRefusal
from remoted.api.routes import ROUTES

DAEMON_UID = 1000
PEERS = {"owner": Peer(1000, 1000, 1), "root": Peer(0, 0, 1), "other": Peer(1001, 1001, 1), "nobody": Peer(65534, 65534, 1)}
MATRIX = Path(__file__).with_name("access_matrix.txt")


def matrix() -> str:
    lines = [f"{'method':<7}{'path':<30}{'rule':<9}" + "".join(f"{name:<8}" for name in PEERS)]
    for route in ROUTES:
        verdicts = ["yes" if admits(peer, DAEMON_UID) and allows(route.rule, peer, DAEMON_UID) else "-" for peer in PEERS.values()]
        lines.append(f"{route.method:<7}{route.path:<30}{route.rule.value:<9}" + "".join(f"{verdict:<8}" for verdict in verdicts))
    return "".join(line.rstrip() + "\n" for line in lines)


def test_t09_the_table_is_the_checked_in_matrix() -> None:
    assert matrix() == MATRIX.read_text(encoding="utf-8")


def test_t09_no_route_stands_twice_and_none_hides_another() -> None:
    for route in ROUTES:
        found, _ = find_route(route.method, route.path.replace("{id}", "00"))
        assert found is route


@pytest.mark.parametrize(
    "path", ["", "/", "/v1", "/v1/", "/v1/job", "/v1/jobs/a/unknown", "//v1/status", "/v1/status/", "/V1/status", "v1/status"]
)
def test_t09_what_is_absent_is_refused(path: str) -> None:
    with pytest.raises(HttpRefusal) as refusal:
        find_route("GET", path)
    assert refusal.value.code == "NO_ROUTE"


def test_t09_every_route_says_what_it_does() -> None:
    for route in ROUTES:
        assert route.handler.__doc__, route.path
        assert (route.body is not None) == (route.method == "POST" and not route.is_open), route.path


if __name__ == "__main__":
    print(matrix(), end="")
