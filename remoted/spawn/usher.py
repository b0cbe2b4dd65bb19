"""From the group of its fork server into its own: how a newborn worker of somebody else's comes under its own limits.

A group takes in a number, not a process, and who controls the server could have it wait for its dead child and let the
number become a stranger's. So the whole group of the server is frozen first: nobody in it can wait for anybody, and a number
that belongs to one of its processes, alive or dead, stays with it until the end (MECHANISMS 9).
"""

from __future__ import annotations

from remoted.cgroup import Group
from remoted.spawn.door import NotBelieved, lives, parent_of
from remoted.spawn.launch import Process


def usher(newborn: Process, server: Group, own: Group) -> bool:
    """True once it is there. Blocking, for a second where somebody does not hold still, else quick. One at a time of one server. Raises NotBelieved when it is not in the server's group, OSError when it cannot be moved."""
    with server.frozen():
        inside = server.pids()
        if not lives(newborn.pidfd):
            raise NotBelieved("the worker is gone")
        if newborn.pid not in inside or parent_of(newborn.pid) not in inside:
            raise NotBelieved("a worker came from another group than its fork server's")
        own.take_in(newborn.pid)
    own.keep_rules()
    return True
