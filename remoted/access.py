"""Who is calling, as the kernel attests it, and what they may do. No I/O.

Identity comes only from SO_PEERCRED on the accepted socket (promise 1); a ``Peer`` is made there, never
parsed from text, and has no zero state (T01, T02).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

#: What a user namespace shows for an unmapped uid (Documentation/admin-guide/sysctl/kernel.rst, overflowuid).
OVERFLOW_UID = 65534
_NO_UID = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a connection, at the moment it connected."""

    uid: int
    gid: int
    pid: int

    def __post_init__(self) -> None:
        if not 0 <= self.uid < _NO_UID or not 0 <= self.gid < _NO_UID:
            raise ValueError(f"cannot trust credentials uid={self.uid} gid={self.gid}")


class Rule(str, Enum):
    """Who may use a route."""

    ANYBODY = "anybody"
    #: Sees and changes only the caller's own objects; another's are not found.
    OWN = "own"
    ADMIN = "admin"


def admits(peer: Peer, daemon_uid: int) -> bool:
    """A user-mode daemon serves its own user (and root, who could become that user) and nobody else (T03)."""
    return peer.uid == daemon_uid or (peer.uid == 0 and daemon_uid != OVERFLOW_UID)


def allows(rule: Rule, peer: Peer, daemon_uid: int) -> bool:
    """Does the route's rule let this peer in?"""
    if rule is Rule.ADMIN:
        return peer.uid in (0, daemon_uid)
    return admits(peer, daemon_uid)
