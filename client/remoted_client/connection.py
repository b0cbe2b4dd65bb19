"""This process's line to the daemon: one socket, one thread that reads it (or who waits for the only call: ``reading``), any thread that writes.

A call never blocks its caller here: what the socket does not take at once waits for the thread, which also finds
or starts the daemon. When the daemon goes away and comes back, the thread reconnects, sends again what was not
acknowledged (under the same submission key, so that nothing runs twice) and asks for the rest by id. A forked
child forgets everything: it is another caller.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from remoted_client import context, wire
from remoted_client.attendant import Attendant
from remoted_client.daemon import SILENCE_SECONDS, SYSTEM_DIRECTORY, await_word, connect, connect_or_start, socket_directory, where_to_look
from remoted_client.errors import DaemonUnreachable, RemotedError, VersionMismatch, WorkerLost, for_code, for_fault
from remoted_client.greeting import hello
from remoted_client.interrupts import interrupts
from remoted_client.lease import Lease
from remoted_client.outbox import Outbox
from remoted_client.payload import Payload
from remoted_client.printed import echo, tell_fault
from remoted_client.reading import Reading
from remoted_client.segments import SegmentPool
from remoted_client.surroundings import Surroundings

if TYPE_CHECKING:
    from remoted_client.call_state import CallState
    from remoted_client.codec import Encoder
    from remoted_client.lease_pool import LeasePool

_READ_BYTES = 256 * 1024
_RECONNECT_SECONDS = 60.0
_EXIT_SECONDS = 10.0


class Upload(NamedTuple):
    """Content that a call refers to by digest."""

    digest: str
    role: str
    data: bytes | Payload


class Outgoing(NamedTuple):
    """A call as it is sent, again if need be. ``common``: what it shares with others of its frame."""

    key: str
    common: dict[str, Any]
    body: bytes
    uploads: tuple[Upload, ...]


class _HungUp(DaemonUnreachable):
    """The daemon ended before it had welcomed us; another one may come."""


class Connection:
    """Made by ``current``; one per process."""

    def __init__(self) -> None:
        from remoted_client.codec import Encoder

        _check_cloudpickle()
        self.pid = os.getpid()
        self.encoder: Encoder = Encoder()
        self.surroundings = Surroundings()
        self._lock = threading.RLock()
        self._states: dict[str, CallState] = {}
        self._unsent: list[CallState] = []
        self._waiting: dict[str, int] = {}
        #: Detached calls that were not taken: nobody may be looking at their handles.
        self._refused: list[CallState] = []
        self._heard = threading.Event()
        self._sock: socket.socket | None = None
        self._ready = False
        self._thread: threading.Thread | None = None
        self.attendant = Attendant()
        self._outbox = Outbox(self._lock, self.attendant)
        self._reading = Reading(self.attendant, self._handle, self._is_alone)
        self.segments = SegmentPool()
        self.daemon: dict[str, Any] = {}
        #: What this process calls itself on its other connections.
        self.name = secrets.token_hex(16)
        self.pools: dict[tuple[str, str], LeasePool] = {}
        self._leases: dict[str, tuple[LeasePool, Lease]] = {}
        self._known: dict[str, set[str]] = {}
        interrupts.show_plainly()
        atexit.register(self._at_exit)

    # -- calls ---------------------------------------------------------------------------------------------

    def start(self, state: CallState) -> None:
        """Send a call, or leave it to the thread. Errors arrive in ``state``."""
        with self._lock:
            self._states[state.key], state.reading = state, self._reading
            if self._ready:
                self._outbox.start(state)
            else:
                self._unsent.append(state)
                self.ensure_thread()

    def attach(self, state: CallState) -> None:
        """Watch a job by its id."""
        with self._lock:
            self._states[state.id] = state
            if self._ready:
                self._send_watch(state)
            else:
                self._unsent.append(state)
                self.ensure_thread()

    def send(self, header: dict[str, Any]) -> None:
        """A small order about a call (cancel, credit); dropped when there is no connection."""
        with self._lock:
            if self._ready:
                self._outbox.write(wire.encode(header))

    def waiting(self, call_id: str, delta: int) -> None:
        """A thread or task of this body begins (+1) or ends (-1) to wait for a nested call."""
        with self._lock:
            count = self._waiting.get(call_id, 0) + delta
            self._waiting[call_id] = count
            if count == (1 if delta > 0 else 0):
                self.send({"op": "waiting", "id": call_id, "waiting": count > 0})

    def _send_watch(self, state: CallState) -> None:
        header = {"op": "watch", "id": state.id, "mine": state.is_mine, "offset": state.reopen_log(), "items": state.items_received}
        self._outbox.write(wire.encode(header))

    # -- the socket ----------------------------------------------------------------------------------------

    def ensure_thread(self) -> None:
        """There is something to do. Any thread."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="remoted-io", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        """The thread: connect, talk until the connection ends, connect again while somebody waits."""
        first = True
        while True:
            try:
                self._connect(first)
                self._talk()
            except Exception as error:  # whatever it was: the next call gets a thread
                self._fail_all(for_fault(error))
            first = False
            if not self._rest():
                return

    def _connect(self, first: bool) -> None:
        """Until a daemon has welcomed us. One that ends meanwhile is waited for like one that has gone."""
        deadline = time.monotonic() + _RECONNECT_SECONDS
        while True:
            self._sock = connect_or_start() if first else self._reconnect(deadline)
            try:
                self._introduce(deadline)
                return
            except _HungUp as error:
                if time.monotonic() > deadline:
                    raise DaemonUnreachable(f"{error} before it had answered, again and again for {_RECONNECT_SECONDS:g} s; {where_to_look()}") from error
                self._sock.close()
                time.sleep(0.05)

    def _rest(self) -> bool:
        """The connection is gone. True if somebody still waits for a call; else this thread ends until the next one."""
        self._reading.close()
        with self._lock:
            self._disconnect()
        for pool in list(self.pools.values()):
            pool.line_is_down()  # a pool's lock comes before the line's: who submits a call has it and asks the line for a lease
        with self._lock:
            self._unsent = []
            for state in list(dict.fromkeys(self._states.values())):
                if state.is_durable or not (state.accepted or state.was_sent):
                    self._unsent.append(state)
                else:
                    state.fail(WorkerLost("the daemon went away while it ran a load-balanced call; such calls are never sent twice", reason="LOST"))
                    self._forget(state)
            if not self._unsent and not any(pool.is_busy for pool in list(self.pools.values())):
                self._thread = None
                return False
            return True

    def _disconnect(self) -> None:
        self._ready = False
        self._heard.set()
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._outbox.close()
        self._leases.clear()

    def _reconnect(self, deadline: float) -> socket.socket:
        """The daemon went away while somebody waits: it is restarted by somebody, or by us."""
        pause, silent_until = 0.05, time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                return connect()
            except OSError:
                if not context.in_worker and time.monotonic() > silent_until:
                    echo.show(2, f"remoted: the daemon went away, waiting up to {_RECONNECT_SECONDS:g} s for the next one ...; {where_to_look()}\n")
                    silent_until = float("inf")
                time.sleep(pause)
                pause = min(1.0, pause * 2)
                if pause == 1.0 and not context.in_worker and socket_directory() != SYSTEM_DIRECTORY:
                    return connect_or_start()
        raise DaemonUnreachable(f"the daemon went away and did not come back within {_RECONNECT_SECONDS:g} s; {where_to_look()}")

    def _introduce(self, deadline: float) -> None:
        """hello, welcome, then everything that waits. Raises VersionMismatch, DaemonUnreachable."""
        assert self._sock is not None
        # While systemd's daemon restarts, its sockets take connections that nobody answers yet.
        self._sock.settimeout(max(1.0, deadline - time.monotonic()))
        with contextlib.suppress(BrokenPipeError):  # refused at the door: the reason can still be read
            self._sock.sendall(hello(self.name))
        frames: list[wire.Frame] = []
        reader = wire.FrameReader()
        await_word(self._sock)
        try:
            while not frames:
                data, fds = wire.receive(self._sock, _READ_BYTES)
                if not data:
                    raise _HungUp("the daemon closed the connection")
                frames = reader.feed(data, fds)
        except wire.WireError as error:
            raise for_code("VERSION_MISMATCH", str(error)) from error
        except TimeoutError as error:
            raise DaemonUnreachable(f"the daemon does not answer: it has taken the connection and said nothing within {_RECONNECT_SECONDS:g} s; {where_to_look()}") from error
        except OSError as error:
            raise _HungUp(f"the daemon went away: {error}") from error
        if frames[0].op == "refused":
            raise for_code(frames[0].header["code"], frames[0].header["message"])
        self.daemon = frames[0].header
        with self._lock:
            self._sock.setblocking(False)
            self._reading.open(self._sock, reader)
            self._outbox.open(self._sock)
            self._ready = True
            for call_id, count in self._waiting.items():
                if count:
                    self.send({"op": "waiting", "id": call_id, "waiting": True})
            unsent, self._unsent = self._unsent, []
            self._outbox.send_calls([state for state in unsent if not (state.id and state.is_durable)], again=True)
            for state in unsent:
                if state.id and state.is_durable:
                    self._send_watch(state)
        for pool in list(self.pools.values()):
            pool.reopen()

    def _talk(self) -> None:
        assert self._sock is not None
        self.attendant.rounds(self._sock, self._reading.read, self._flush)

    def _flush(self) -> bool:
        with self._lock:
            return self._outbox.flush()

    def _handle(self, frame: wire.Frame) -> None:
        """What the daemon says. What goes wrong with one call ends that one."""
        if frame.op in ("accepted", "done"):
            for word, body in wire.calls_of(frame):
                self._apart(word, self._on_accepted if frame.op == "accepted" else self._on_done, word, body, frame.fds)
        else:
            self._apart(frame.header, self._dispatch, frame)

    def _apart(self, word: dict[str, Any] | list[str], handle: Callable[..., None], *arguments: Any) -> None:
        """What goes wrong with one call ends that one, and not the thread that everybody's calls need. ``word`` names it."""
        try:
            handle(*arguments)
        except Exception as error:
            names = word if isinstance(word, list) else [word.get("key", ""), word.get("id", "")]
            states = [self._states[name] for name in names if name in self._states]
            leased = [self._leases[name] for name in names if name in self._leases]
            for state in states:
                self._give_up(state, for_fault(error))
            for pool, lease in leased:
                pool.on_fault(lease, error)
            if not states and not leased:
                tell_fault("a fault in reading what the daemon says")

    # -- what the daemon says ------------------------------------------------------------------------------

    def _dispatch(self, frame: wire.Frame) -> None:
        header = frame.header
        if frame.op == "pong":
            self._heard.set()
            return
        leased = self._leases.get(header.get("id", ""))
        if leased is not None and frame.op != "refused":
            leased[0].on_event(leased[1], frame)
            return
        state = self._states.get(header.get("key", "")) or self._states.get(header.get("id", ""))
        if state is None:
            if frame.op == "refused" and header.get("about") == "put":
                self._refused_upload(header)
            frame.close()
        elif frame.op == "refused":
            self._on_refused(state, header)
        else:
            state.on_event(frame)

    def _on_accepted(self, word: list[str], body: bytes, fds: tuple[int, ...]) -> None:
        key, call_id = word
        state = self._states.get(key)
        if state is not None:
            self._states[call_id] = state
            state.on_accepted(call_id)

    def _on_done(self, word: dict[str, Any], body: bytes, fds: tuple[int, ...]) -> None:
        """What an uneventful call has not to say is not sent."""
        frame = wire.Frame({**wire.DONE, **word}, body, fds)
        call_id = word["id"]
        leased, state = self._leases.get(call_id), self._states.get(call_id) or self._states.get(word.get("key", ""))
        if leased is not None:
            leased[0].on_event(leased[1], frame)
        elif state is not None:
            state.on_done(frame)
            with self._lock:
                self._forget(state)
        else:
            frame.close()

    def _is_alone(self, state: CallState) -> bool:
        """Is there no other call that could be told of? Nothing of a user's hangs on its end then."""
        with self._lock:
            return self._ready and len(self._states) <= 2 and all(other is state for other in self._states.values()) and not state.has_callbacks

    def _on_refused(self, state: CallState, header: dict[str, Any]) -> None:
        with self._lock:
            if header["code"] == "MISSING_CONTENT" and state.outgoing is not None and not state.resent:
                state.resent = True
                self._outbox.known.difference_update(upload.digest for upload in state.outgoing.uploads)
                self._outbox.send_calls([state], again=True)
                return
            if header.get("about") in ("submit", "call", "watch"):
                self._give_up(state, for_code(header["code"], header["message"]))

    def _refused_upload(self, header: dict[str, Any]) -> None:
        """Content was not taken (disk full, over a limit): every call that needs it fails with that reason."""
        with self._lock:
            self._outbox.known.discard(header.get("digest", ""))
            for state in list(dict.fromkeys(self._states.values())):
                if state.outgoing is not None and any(upload.digest == header.get("digest") for upload in state.outgoing.uploads):
                    self._give_up(state, for_code(header["code"], header["message"]))

    def _give_up(self, state: CallState, error: RemotedError) -> None:
        self._forget(state)
        state.fail(error)
        if state.is_detached and state.outgoing is not None:
            self._refused.append(state)

    def _forget(self, state: CallState) -> None:
        self._states.pop(state.key, None)
        self._states.pop(state.id, None)

    def _fail_all(self, error: RemotedError) -> None:
        with self._lock:
            states, self._states, self._unsent = list(dict.fromkeys(self._states.values())), {}, []
        for state in states:
            self._give_up(state, error)
        for pool in list(self.pools.values()):
            pool.fail_all(error)

    # -- leases --------------------------------------------------------------------------------------------

    def expect_lease(self, pool: LeasePool, lease: Lease) -> None:
        """The daemon will be asked for it from the thread, and tell of it here."""
        self._leases[lease.id] = (pool, lease)
        self.ensure_thread()

    def bring(self, uploads: tuple[Upload, ...]) -> None:
        """Content that the daemon does not have yet."""
        with self._lock:
            for upload in uploads:
                self._outbox.put(upload)

    def follow_lease(self, pool: LeasePool, lease: Lease) -> None:
        """The next daemon tells of it from here on."""
        self._leases[lease.id] = (pool, lease)
        self.send({"op": "watch", "id": lease.id, "mine": True, "offset": lease.bookmark.come_back()})

    def forget_lease(self, lease: Lease) -> None:
        self._leases.pop(lease.id, None)

    def known_by(self, worker: str) -> set[str]:
        """Digests of what this process has sent to a worker: content goes there once."""
        return self._known.setdefault(worker, set())

    # -- the end of the script -----------------------------------------------------------------------------

    def _tell_refused(self, unheard: list[CallState]) -> None:
        """Nobody waits for detached calls: that some were not taken is said, not swallowed."""
        lost = [state for state in self._refused if not state.was_awaited] + unheard
        if lost:
            why = next((str(state.error) for state in lost if state.error is not None), f"the daemon did not answer within {_EXIT_SECONDS:g} s")
            names = ", ".join(sorted({state.name for state in lost})[:3])
            sys.stderr.write(f"remoted: {len(lost)} detached {'calls were' if len(lost) > 1 else 'call was'} not taken ({names}): {why}\n")

    def _hear_all(self, deadline: float) -> None:
        """What calls on leases have printed and the daemon has on its way to us is shown before the script ends."""
        self._heard = threading.Event()
        self.send({"op": "ping"})
        if self._ready:
            self._heard.wait(max(0.0, deadline - time.monotonic()))

    def _at_exit(self) -> None:
        """Detached calls are handed over; others that nobody awaited are cancelled, and that is said (MECHANISMS 13)."""
        if self.pid != os.getpid():
            return
        self._hand_over()
        echo.end()

    def _hand_over(self) -> None:
        leased = [call for pool in list(self.pools.values()) for call in pool.calls()]
        with self._lock:
            states = [*dict.fromkeys(self._states.values()), *leased]
        deadline = time.monotonic() + _EXIT_SECONDS
        for state in states:
            if state.is_detached:
                state.wait_accepted(max(0.0, deadline - time.monotonic()))
        if self.pools:
            self._hear_all(deadline)
        self._tell_refused([state for state in states if state.is_detached and not (state.accepted or state.is_over)])
        left = [state for state in states if state.is_mine and not state.is_over and not state.was_awaited]
        if left and not interrupts.is_told:
            names = ", ".join(sorted({state.name for state in left})[:3])
            sys.stderr.write(f"remoted: {len(left)} {'calls were' if len(left) > 1 else 'call was'} not awaited and ended with this script ({names}); .options(detach=True) lets a call run on\n")


def _check_cloudpickle() -> None:
    """Raises VersionMismatch: older ones pickle classes in another way, and the worker would not understand."""
    import cloudpickle

    if int(cloudpickle.__version__.split(".")[0]) < 3:
        raise VersionMismatch(f"cannot send calls with cloudpickle {cloudpickle.__version__}: 3 or newer is needed; run: {sys.executable} -m pip install -U cloudpickle")


_current: Connection | None = None
_current_lock = threading.Lock()


def current() -> Connection:
    """This process's connection; made at the first call, made anew in a forked child."""
    global _current
    found = _current
    if found is None:
        with _current_lock:
            if _current is None:
                _current = Connection()
            found = _current
    return found


def _forget_in_child() -> None:
    """A fork copies the descriptor but must not speak on it, nor keep its parent's end alive."""
    global _current, _current_lock
    _current_lock = threading.Lock()
    inherited, _current = _current, None
    if inherited is None:
        return
    if inherited._sock is not None:
        inherited._sock.close()
    for pool in inherited.pools.values():
        pool.abandon()
    inherited.segments.forget()


os.register_at_fork(after_in_child=_forget_in_child)
