"""T09: who may use which route, as a file that a reviewer reads; the table must equal it.

After a wanted change: ``python tests/security/test_access_matrix.py > tests/security/access_matrix.txt``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from remoted.access import Access, Peer
from remoted.api.dispatch import find_route
from remoted.api.exchange import HttpRefusal
from remoted.api.routes import ROUTES

PEERS = {"owner": Peer(1000, 1000, 1), "root": Peer(0, 0, 1), "other": Peer(1001, 1001, 1), "nobody": Peer(65534, 65534, 1)}
#: A user's own daemon; and the system's, where ``own`` means that everybody finds his own and nothing else.
HOUSES = {"user": Access(1000), "system": Access(0, serves_everybody=True, runs_root=False)}
MATRIX = Path(__file__).with_name("access_matrix.txt")


def matrix() -> str:
    columns = [(house, peer) for house in HOUSES for peer in PEERS]
    lines = [f"{'':<46}" + "".join(f"{house:<8}" for house, _ in columns), f"{'method':<7}{'path':<30}{'rule':<9}" + "".join(f"{peer:<8}" for _, peer in columns)]
    for route in ROUTES:
        asked = [(HOUSES[house], PEERS[peer]) for house, peer in columns]
        verdicts = ["yes" if house.admits(peer) and house.allows(route.rule, peer) else "-" for house, peer in asked]
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
