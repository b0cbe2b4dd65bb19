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
class Identity:
    """As whom a worker runs: uid, gid, groups and limits of the process that called, as the kernel attests them."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    #: (number, soft, hard) of setrlimit(2).
    limits: tuple[tuple[int, int, int], ...] = ()
    #: Whose the uid was when the call was made; "" where the host need not know. It gives nobody anything: a uid may be somebody else's later.
    name: str = ""


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a connection, at the moment it connected."""

    uid: int
    gid: int
    pid: int
    groups: tuple[int, ...] = ()
    limits: tuple[tuple[int, int, int], ...] = ()
    #: Of its account, once that has been asked for.
    name: str = ""

    def __post_init__(self) -> None:
        if not all(0 <= number < _NO_UID for number in (self.uid, self.gid, *self.groups)):
            raise ValueError(f"cannot trust credentials uid={self.uid} gid={self.gid}")

    @property
    def identity(self) -> Identity:
        return Identity(self.uid, self.gid, tuple(sorted({*self.groups})), self.limits, self.name)


class Rule(str, Enum):
    """Who may use a route."""

    ANYBODY = "anybody"
    #: Sees and changes only the caller's own objects; another's are not found.
    OWN = "own"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Access:
    """Whom a daemon serves. A user's own: that user, and root, who could become that user. The system's: everybody."""

    daemon_uid: int
    serves_everybody: bool = False
    #: May root's own calls run, as root? Only where the configuration says so (T04).
    runs_root: bool = True

    def admits(self, peer: Peer) -> bool:
        """May this peer connect at all? Nobody in particular, as a user namespace shows unmapped users, may not (T03)."""
        if self.serves_everybody:
            return peer.uid != OVERFLOW_UID
        return peer.uid == self.daemon_uid or (peer.uid == 0 and self.daemon_uid != OVERFLOW_UID)

    def allows(self, rule: Rule, peer: Peer) -> bool:
        """Does the route's rule let this peer in?"""
        if rule is Rule.ADMIN:
            return peer.uid in (0, self.daemon_uid)
        return self.admits(peer)

    def may_run(self, peer: Peer) -> bool:
        """May the functions of this peer, who was admitted, run here?"""
        return peer.uid != 0 or self.runs_root or not self.serves_everybody
