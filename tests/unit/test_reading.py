"""Who reads the line to the daemon: its own thread, or the thread that waits for the only call."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from remoted_client import wire
from remoted_client.attendant import Attendant
from remoted_client.call_state import CallState
from remoted_client.reading import Reading

KEY, ID = "k" * 32, "1" * 32


def frame_of(op: str, word: Any) -> bytes:
    frame = wire.CallsFrame({"op": op})
    frame.add(word)
    return b"".join(frame.frames())


ACCEPTED, DONE = frame_of("accepted", [KEY, ID]), frame_of("done", {"id": ID, "worker": "w"})
OTHERS = frame_of("done", {"id": "2" * 32, "worker": "w"})


class Line:
    """A line with its thread. ``handled``: the frames, each with the name of the thread that handled it."""

    def __init__(self) -> None:
        ours, self.daemon = socket.socketpair()
        ours.setblocking(False)
        self.state = CallState("f", None, durable=True, detached=False, stream=False, echo=False)
        self.state.key = KEY
        self.handled: list[tuple[str, str]] = []
        self.has_handled = threading.Semaphore(0)
        self.on_frame: Callable[[wire.Frame], None] = lambda frame: None
        self.attendant = Attendant()
        self.reading = Reading(self.attendant, self._handle, lambda state: True)
        self.reading.open(ours, wire.FrameReader())
        self._sock = ours
        self.thread = threading.Thread(target=self.attendant.rounds, args=(ours, self.reading.read, lambda: False), name="line", daemon=True)
        self.thread.start()
        while not self.attendant._events:
            os.sched_yield()  # it does not listen yet

    def _handle(self, frame: wire.Frame) -> None:
        self.handled.append((frame.op, threading.current_thread().name))
        self.on_frame(frame)
        frame.close()
        if frame.op == "done" and (word := frame.header["calls"][0])["id"] == ID:
            self.state.on_done(wire.Frame({**wire.DONE, **word}, b""))
        self.has_handled.release()

    def follow(self, timeout: float | None = None) -> threading.Thread:
        follower = threading.Thread(target=self.reading.follow, args=(self.state, timeout), name="waiting", daemon=True)
        follower.start()
        while follower.is_alive() and self.attendant._events:
            os.sched_yield()  # the line's thread listens still
        return follower

    def close(self) -> None:
        self.daemon.close()
        self.thread.join(10)
        self.reading.close()
        self._sock.close()


@pytest.fixture
def line() -> Iterator[Line]:
    found = Line()
    yield found
    found.close()


def test_f30_who_waits_for_the_only_call_reads_its_end(line: Line) -> None:
    follower = line.follow()
    line.attendant.wake()  # it looks again, and leaves what comes alone
    line.daemon.send(ACCEPTED + DONE)
    follower.join(10)

    assert line.handled == [("accepted", "waiting"), ("done", "waiting")]
    assert line.state.is_over


def test_f30_what_is_about_something_else_is_left_to_the_lines_thread(line: Line) -> None:
    follower = line.follow()

    line.daemon.send(ACCEPTED + OTHERS + DONE)
    follower.join(10)
    for _ in range(3):
        assert line.has_handled.acquire(timeout=10)

    assert [(op, who) for op, who in line.handled] == [("accepted", "line"), ("done", "line"), ("done", "line")]


def test_f30_a_frame_with_descriptors_is_read_whole_by_the_lines_thread(line: Line) -> None:
    follower = line.follow()
    fd = wire.memfd("result", b"large")

    wire.send(line.daemon, wire.encode({"op": "done", "calls": [{"id": ID, "worker": "w"}], "sizes": [0]}, fd_count=1), (fd,))
    follower.join(10)
    os.close(fd)

    assert line.has_handled.acquire(timeout=10)
    assert line.handled == [("done", "line")]


def test_f30_half_a_frame_is_left_until_it_is_whole(line: Line) -> None:
    follower = line.follow()

    line.daemon.send(DONE[:20])
    follower.join(10)
    line.daemon.send(DONE[20:])

    assert line.has_handled.acquire(timeout=10)
    assert line.handled == [("done", "line")]


def test_f30_an_end_that_the_lines_thread_had_begun_to_read_wakes_who_waits(line: Line) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold(frame: wire.Frame) -> None:
        entered.set()
        assert go_on.wait(10)

    line.on_frame = hold
    line.daemon.send(OTHERS)
    assert entered.wait(10)
    line.daemon.send(DONE)
    follower = line.follow()
    line.on_frame = lambda frame: None
    go_on.set()
    follower.join(10)

    assert not follower.is_alive()


def test_f30_an_interrupt_between_any_two_steps_loses_nothing(line: Line) -> None:
    """Ctrl-C comes when the end was handled and still lies in the socket."""

    def interrupt(frame: wire.Frame) -> None:
        if threading.current_thread().name == "waiting":
            raise KeyboardInterrupt

    line.on_frame = interrupt
    threading.excepthook, before = lambda arguments: None, threading.excepthook
    try:
        follower = line.follow()
        line.daemon.send(ACCEPTED + DONE)
        follower.join(10)
    finally:
        threading.excepthook = before

    assert line.has_handled.acquire(timeout=10)
    assert line.has_handled.acquire(timeout=10)
    assert line.handled == [("accepted", "waiting"), ("accepted", "line"), ("done", "line")]
    assert line.state.is_over


def test_f30_the_end_of_the_connection_ends_the_wait(line: Line) -> None:
    follower = line.follow()

    line.daemon.close()
    follower.join(10)

    assert not follower.is_alive()
    assert not line.state.is_over


def test_f30_a_wait_for_so_long_ends_in_time_and_the_lines_thread_reads_on(line: Line) -> None:
    line.follow(0.01).join(10)

    line.daemon.send(DONE)

    assert line.has_handled.acquire(timeout=10)
    assert line.handled == [("done", "line")]


def test_f30_a_signal_handler_of_the_thread_that_waits_may_call_and_wait(line: Line) -> None:
    """The line's thread reads again as soon as something else is sent, however long the handler takes."""
    follower = line.follow()
    line.attendant.take_back()

    line.daemon.send(OTHERS)

    assert line.has_handled.acquire(timeout=10)
    assert line.handled == [("done", "line")]
    follower.join(10)
    assert not follower.is_alive()  # it waits as others do


def test_f30_two_threads_that_wait_for_one_call_do_not_both_read(line: Line) -> None:
    first = line.follow()

    line.follow().join(10)  # it comes back at once
    assert first.is_alive()
    line.daemon.send(ACCEPTED + DONE)
    first.join(10)

    assert line.state.is_over
