"""The worker's end of its channel: the main thread reads while it is idle, the channel's own thread meanwhile."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from remoted.worker.link import Link
from remoted_client import wire


class Ends:
    """Both ends. ``heard``: each message with the thread that handled it."""

    def __init__(self) -> None:
        self.daemon, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fd = worker.detach()
        self.link = Link(self.fd)
        self.heard: queue.Queue[tuple[int, str]] = queue.Queue()
        self.is_closed = threading.Event()
        self.on_frame: Callable[[wire.Frame], None] = lambda frame: None
        self.link.listen(self._on_frame, self.is_closed.set)

    def _on_frame(self, frame: wire.Frame) -> None:
        self.heard.put((frame.header["number"], threading.current_thread().name))
        self.on_frame(frame)

    def say(self, *numbers: int) -> None:
        for number in numbers:
            self.daemon.send(wire.encode({"op": "order", "number": number}))

    def idle(self, messages: int) -> threading.Thread:
        """A thread that has nothing to do until so many more have been handled."""
        wanted = self.heard.qsize() + messages
        thread = threading.Thread(target=self.link.read_while, args=(lambda: self.heard.qsize() < wanted,), name="idle", daemon=True)
        thread.start()
        while thread.is_alive() and not self.link._is_lent:
            os.sched_yield()
        return thread


@pytest.fixture
def ends() -> Iterator[Ends]:
    found = Ends()
    yield found
    found.daemon.close()
    assert found.is_closed.wait(10)
    found.link._sock.close()


def test_f25_the_channels_thread_reads_while_a_body_runs(ends: Ends) -> None:
    ends.say(1)

    assert ends.heard.get(timeout=10) == (1, "channel")


def test_f30_an_idle_main_thread_reads_itself(ends: Ends) -> None:
    idle = ends.idle(3)
    ends.say(1, 2, 3)
    idle.join(10)

    heard = [ends.heard.get(timeout=10) for _ in range(3)]
    assert [number for number, _ in heard] == [1, 2, 3]
    assert {who for _, who in heard[1:]} == {"idle"}

    ends.say(4)
    assert ends.heard.get(timeout=10) == (4, "channel")


def test_f30_what_the_channels_thread_had_in_its_hands_wakes_who_is_idle(ends: Ends) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold(frame: wire.Frame) -> None:
        entered.set()
        assert go_on.wait(10)

    ends.on_frame = hold
    ends.say(1)
    assert entered.wait(10)
    ends.heard.get()
    idle = ends.idle(1)
    ends.on_frame = lambda frame: None
    ends.say(2)
    go_on.set()
    idle.join(10)

    assert not idle.is_alive()
    assert ends.heard.get(timeout=10)[0] == 2


def test_f25_messages_are_handled_in_their_order_whoever_reads(ends: Ends) -> None:
    for start in range(0, 2000, 20):
        idle = ends.idle(start % 7)
        ends.say(*range(start, start + 20))
        idle.join(10)

    assert [ends.heard.get(timeout=10)[0] for _ in range(2000)] == list(range(2000))


def test_c09_a_daemon_that_is_gone_is_heard_of_once_by_whoever_waits(ends: Ends) -> None:
    idle = ends.idle(1)
    ends.daemon.close()
    idle.join(10)

    assert ends.is_closed.wait(10)
    assert ends.link.closed
    assert not idle.is_alive()


CLOSES_ALL = """
import os, socket
from remoted.worker.link import Link
_, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link = Link(ours.detach())
link.listen(print, lambda: print("closed", flush=True))
os.closerange(3, 100)
link.read_while(lambda: True)
os._exit(0)
"""


def test_f25_a_channel_that_a_body_has_closed_has_ended() -> None:
    """With all other descriptors, as a program does that becomes a daemon."""
    done = subprocess.run([sys.executable, "-c", CLOSES_ALL], capture_output=True, text=True, timeout=30, check=True)

    assert done.stdout == "closed\n"
