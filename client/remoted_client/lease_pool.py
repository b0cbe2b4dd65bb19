"""The leases of one pool of workers, and the calls that wait for one: first come, first served.

All state changes happen under one lock. A call is given to a lease at the last moment, so it goes to whichever worker
is free first. A lease that ends without having accepted its call gives it back; one that had accepted it does not: a
direct call is never run twice.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from remoted_client.call_queue import CallQueue
from remoted_client.errors import RemotedError, WorkerLost, for_code, for_fault
from remoted_client.lease import LINE, Lease
from remoted_client.leased_call import LeasedCall, header_of, translated
from remoted_client.patience import Patience
from remoted_client.printed import tell_fault, tell_preload
from remoted_client.provision import Provision
from remoted_client.unread import drop
from remoted_client.wire import Frame, Status

if TYPE_CHECKING:
    from remoted_client.connection import Connection, Upload
    from remoted_client.home import Home
    from remoted_client.segments import Segment

#: Output may come later than the answer that it belongs to; an answer waits for it while it comes, and so long after.
_PRINTED_SECONDS = 0.1
#: The daemon's word on a lost worker follows the end of its connections.
_VERDICT_SECONDS = 5.0


class LeasePool:
    """For calls whose spec, but for the function, and whose surroundings are the same."""

    def __init__(self, line: Connection, spec: Upload, context: Upload, name: str, workers_most: int, concurrency: int) -> None:
        """``concurrency``: how many leases one worker has at once."""
        self._line = line
        self._name = name
        request = {"op": "lease", "client": line.name, "spec": spec.digest, "context": context.digest, "name": name}
        self._provision = Provision(line, (spec, context), request, workers_most, concurrency)
        self._lock = threading.RLock()
        self._idle: list[Lease] = []
        self._leases = self._provision.leases
        self._queue = CallQueue()
        self._patience = Patience(line, self._lock, self._queue, self._provision)
        #: Sent, and nobody has begun to wait for it.
        self._unclaimed: LeasedCall | None = None
        #: No calls come here any more.
        self.is_forgotten = False

    # -- calls in ------------------------------------------------------------------------------------------

    def submit(self, call: LeasedCall) -> None:
        """Send it now, or as soon as a worker is free."""
        with self._lock:
            if self._unclaimed is not None:
                self._attend_unclaimed()
            if not self._idle or not self._send_now(call):
                self._queue.add(call)
                self._attend_all()
                self._provide()
        self._line.ensure_thread()  # the lease may have outlived the daemon, and nobody have looked for the next one yet
        if self._queue:
            self._patience.watch()

    def _send_now(self, call: LeasedCall) -> bool:
        """By a lease that is free: nobody who waits can use it."""
        while (lease := self._take_idle(call.home)) is not None:
            if self._send(lease, call):
                self._unclaimed = call
                return True
        return False

    def _take_idle(self, home: Home | None) -> Lease | None:
        """The one that was used last, of those that lead to the home."""
        if home is None or (self._idle and self._idle[-1].worker == home.worker):
            return self._idle.pop() if self._idle else None
        found = next((lease for lease in reversed(self._idle) if lease.worker == home.worker), None)
        if found is not None:
            self._idle.remove(found)
        return found

    def _attend_unclaimed(self) -> None:
        """Another call comes before anybody waits for the last one: its answer must not wait for that."""
        call, self._unclaimed = self._unclaimed, None
        if call is not None:
            self.attend(call)

    def _attend_all(self) -> None:
        """Calls wait for these leases to become free, so answers are read as they come."""
        for lease in self._leases:
            if lease.call is not None:
                self.attend(lease.call)

    def _send(self, lease: Lease, call: LeasedCall) -> bool:
        """False: that lease is of no use any more, and the call still has to be sent."""
        problem: Exception | None = None
        try:
            if lease.start(call):
                if not call.on_sent(lease) and self._queue:
                    self.attend(call)
                return True
        except Exception as error:  # of the call, or of this process: another lease would not help
            lease.call, problem = None, error
        self._keep_segment(lease, call)
        self._retire(lease)
        if problem is not None:  # not under the lock: others hear of it
            threading.Thread(target=call.fail, args=(for_fault(problem),), name="remoted-fault", daemon=True).start()
        return problem is not None

    def _next(self, lease: Lease) -> None:
        """The lease is free for whoever waits longest."""
        if lease.is_closed or lease.last_accepted is not None:
            self._retire(lease)
            return
        if self._queue and self._serve(lease):
            return
        if lease.reader == LINE:
            lease.reader = None
            self._line.attendant.leave(lease)
        self._idle.append(lease)
        if self._queue:
            self._provide()

    def _serve(self, lease: Lease) -> bool:
        """False: nobody who waits can use it."""
        call = self._queue.take(lease.worker)
        if call is None:
            return False
        if not self._send(lease, call):
            self._queue.put_back(call)
            self._provide()
        return True

    # -- who reads -----------------------------------------------------------------------------------------

    def claim(self, call: LeasedCall, reader: object) -> Lease | None:
        with self._lock:
            if self._unclaimed is call:
                self._unclaimed = None
            lease = call.lease
            if lease is None or lease.reader is not None or lease.call is not call or lease.held is not None or lease.is_closed:
                return None
            lease.reader = reader
            return lease

    def unclaim(self, lease: Lease, reader: object) -> None:
        """Whoever this is reads no more. It may be another one's turn already."""
        with self._lock:
            if lease.reader is not reader:
                return
            lease.reader = None
            call = lease.call
            if call is not None and (self._queue or not call.is_stream):
                # Its reader gave up, or another call was sent meanwhile. That of a stream comes back for more.
                self.attend(call)

    def receive(self, call: LeasedCall) -> bool:
        """The thread that waits for a call reads its answer: nobody else has to be woken."""
        lease = self.claim(call, call)
        if lease is None:
            return call.is_over
        try:
            while lease.read(None) and lease.carries(call):
                pass
        finally:
            if lease.reader is call:  # a value has given it back already
                self.unclaim(lease, call)
        return call.is_over

    def attend(self, call: LeasedCall) -> None:
        with self._lock:
            lease = call.lease
            if lease is not None and lease.reader is None and lease.call is call and not lease.is_closed:
                lease.reader = LINE
                self._line.attendant.attend(lease)

    def line_is_down(self) -> None:
        """The connection's thread looks for a daemon now: who waits for a call reads its answer again."""
        with self._lock:
            for lease in self._leases:
                if lease.reader == LINE:
                    lease.reader = None
                    if lease.call is not None:
                        lease.call.wake()

    def tell(self, call: LeasedCall, header: dict[str, Any]) -> None:
        with self._lock:
            lease = call.lease
            if lease is not None and lease.call is call and not lease.is_closed:
                lease.tell(header)

    def withdraw(self, call: LeasedCall) -> bool:
        with self._lock:
            if not self._queue.take_out(call):
                return call.is_over
        call.on_answer(header_of(Status.CANCELLED, "CANCELLED", "stopped: it was cancelled"), Frame({}, b""))
        return True

    # -- leases --------------------------------------------------------------------------------------------

    def _provide(self) -> None:
        """What waits gets the leases that are free, and others are opened for the rest."""
        for lease in list(self._idle):
            if self._queue and lease in self._idle:
                self._idle.remove(lease)
                if not self._serve(lease):
                    self._idle.append(lease)
        self._provision.provide(self, self._queue, self._idle)

    def _retire(self, lease: Lease, is_lost: bool = False) -> None:
        """It carries no more calls, and nobody reads it but whoever is here. ``is_lost``: with its worker."""
        lease.close()
        if lease in self._idle:
            self._idle.remove(lease)
        if lease in self._leases and lease.is_granted:
            self._line.segments.leave(lease.worker, is_lost)
        self._provision.forget(lease)
        if self._queue:
            self._provide()

    def _keep_segment(self, lease: Lease, call: LeasedCall) -> None:
        """The worker has not accepted this call, so its arguments are still ours."""
        if call.segment is not None:
            call.segment.borrower = ""

    def take_back(self, segment: Segment) -> None:
        self._line.segments.take_back(segment.number)

    def on_granted(self, lease: Lease, header: dict[str, Any]) -> None:
        with self._lock:
            lease.granted(header["worker"], self._line.known_by(header["worker"]), self._line.segments.enter(header["worker"]))
            self._next(lease)
            if self._queue:
                self._provide()  # instances that live nowhere may be settled now

    def _on_settled(self, lease: Lease, header: dict[str, Any]) -> None:
        with self._lock:
            self._provision.on_settled(header["instance"])
            refused = self._queue.take_of(header["instance"]) if "code" in header else []
            self._queue.settle(header["instance"], header["worker"], header["drops"])
            if not (header["worker"] or refused) and lease in self._idle:
                self._retire(lease)  # the daemon knows it no more
            elif self._queue:
                self._provide()
        for call in refused:
            call.fail(for_code(header["code"], header["message"]))

    def on_refused(self, lease: Lease, header: dict[str, Any]) -> None:
        with self._lock:
            if header["code"] == "MISSING_CONTENT" and self._provision.send_again(lease):
                return
        self._give_up(lease, for_code(header["code"], header["message"]))

    def on_fault(self, lease: Lease, error: Exception) -> None:
        if not self._give_up(lease, for_fault(error)) and not isinstance(error, (RemotedError, OSError)):
            tell_fault("a fault in reading what a worker says")

    def _give_up(self, lease: Lease, error: RemotedError) -> bool:
        """No lease, and so no answer for the call in hand, or for those that it was opened for. False: there are none."""
        with self._lock:
            call, lease.call, lease.held = lease.call, None, None
            concerned = [call] if call is not None else [] if lease.is_granted else self._queue.take_before(lease.home, lease.opened_at)
            self._retire(lease)
            self._line.forget_lease(lease)
        for each in concerned:
            each.fail(error)
        return bool(concerned)

    def on_item(self, lease: Lease, frame: Frame) -> None:
        self._take_back(lease, frame.header)
        call = lease.call
        if call is None or frame.header["n"] != call.number:
            drop(frame)
            return
        call.on_event(frame)

    def _take_back(self, lease: Lease, header: dict[str, Any]) -> None:
        for number in header.get("freed", ()):
            self._line.segments.take_back(number, lease.worker)
        header["releases"] = lease.releases  # where its own segment is given back

    def on_answer(self, lease: Lease, frame: Frame) -> None:
        header = frame.header
        with self._lock:
            call = lease.call
            self._take_back(lease, header)
            if call is None or header["n"] != call.number:
                drop(frame)
                return
            if header.get("printed") and lease.printed < call.number and not lease.is_closed:
                lease.held = lambda: self._conclude(lease, call, frame)
                self._await_output(lease, call, frame, lease.output_bytes)
                return
        self._conclude(lease, call, frame)

    def on_value(self, lease: Lease, payload: bytes) -> None:
        """As ``on_answer``, of a call that has nothing to tell but its value: most of them. A thread that reads it is done with the lease."""
        with self._lock:
            call, lease.call = lease.call, None
            if lease.reader is call and not self._queue:
                lease.reader = None
            self._next(lease)
        if call is not None:
            call.on_value(payload)

    def _await_output(self, lease: Lease, call: LeasedCall, frame: Frame, seen: int) -> None:
        def look() -> None:
            if lease.call is call and lease.output_bytes > seen:
                self._await_output(lease, call, frame, lease.output_bytes)
            else:
                self._conclude(lease, call, frame)

        self._line.attendant.after(_PRINTED_SECONDS, look)

    def _conclude(self, lease: Lease, call: LeasedCall, frame: Frame) -> None:
        """Its answer is complete; once."""
        with self._lock:
            if lease.call is not call:
                return
            lease.call, lease.held = None, None
            is_stale = frame.header.get("kind") == "stale"
            if is_stale:  # nothing of it ran: the worker has older code, and takes no more
                lease.last_accepted = call.number
                self._queue_again(lease, call)
            self._next(lease)
        if is_stale:
            frame.close()
            self._withdraw_cancelled(call)
        else:
            call.on_answer(translated(lease, call, frame.header), frame)

    def on_closed(self, lease: Lease) -> None:
        """No more will come: what was accepted is lost, what was not is sent elsewhere."""
        with self._lock:
            call = lease.call
            if call is None or lease.held is not None:
                self._retire(lease)
                return
            accepted = lease.last_accepted
            if accepted is None and lease.ended is not None:
                accepted = lease.ended.get("accepted", call.number)
            if accepted is None:
                lease.held = lambda: self._lose(lease, call)
                self._line.attendant.after(_VERDICT_SECONDS, lambda: self._lose(lease, call))
                return
            if accepted < call.number:
                lease.call = None
                self._queue_again(lease, call)
                self._retire(lease)
        if accepted < call.number:
            self._withdraw_cancelled(call)
        else:
            self._lose(lease, call)

    def _queue_again(self, lease: Lease, call: LeasedCall) -> None:
        """Nothing of it ran there."""
        self._keep_segment(lease, call)
        call.on_waiting("WAITING_WORKER")
        self._queue.put_back(call)

    def _withdraw_cancelled(self, call: LeasedCall) -> None:
        """It was cancelled where it did not run."""
        if call.is_cancelled:
            self.withdraw(call)

    def _lose(self, lease: Lease, call: LeasedCall) -> None:
        with self._lock:
            if lease.call is not call:
                return
            lease.call, lease.held = None, None
            if call.home is not None:
                call.home.note_construction()  # whatever was there is gone
            self._retire(lease, is_lost=True)
        header = lease.ended
        if header is None or header["status"] == Status.COMPLETED:
            call.fail(WorkerLost("the worker ended the connection in the middle of the call; such calls are never sent twice", reason="WORKER_DIED"))
        else:
            call.on_answer({**header, "id": call.id, "kind": "died"}, Frame({}, b""))

    # -- what the daemon says on the first connection ------------------------------------------------------

    def on_event(self, lease: Lease, frame: Frame) -> None:
        """State, output and end of one of these leases."""
        header = frame.header
        if frame.op == "output":
            self._on_output(lease, frame)
        elif frame.op == "printed":
            lease.printed = header["number"]
            self._release_held(lease, header["number"])
        elif frame.op == "state":
            self._on_state(lease, header)
        elif frame.op == "done":
            self._on_done(lease, header)
        elif frame.op == "settled":
            self._on_settled(lease, header)
        frame.close()

    def _on_output(self, lease: Lease, frame: Frame) -> None:
        said = lease.bookmark.take(frame)
        lease.output_bytes += len(said)
        call = lease.call or lease.last_call
        if call is None and not lease.is_granted:
            call = next(iter(self._queue.get(lease.home, ())), None)
        if call is not None:
            call.add_output(frame.header["stream"], said)

    def _release_held(self, lease: Lease, number: int) -> None:
        held = lease.held
        if held is not None and lease.call is not None and lease.call.number <= number:
            held()

    def _on_state(self, lease: Lease, header: dict[str, Any]) -> None:
        tell_preload(self._name, header)
        if header["status"] == Status.IN_QUEUE:
            with self._lock:
                for call in self._queue.get(lease.home, ()):
                    call.reason = header["reason"]

    def _on_done(self, lease: Lease, header: dict[str, Any]) -> None:
        lease.ended = header
        self._line.forget_lease(lease)  # the last that is heard of it; its output came before
        if not lease.is_granted and header["status"] != Status.COMPLETED:
            self._fail_waiting(lease, header)
            return
        with self._lock:
            if lease.call is None:
                self._retire(lease)
            elif lease.held is None:
                self.attend(lease.call)  # what is still in its socket comes first
        if lease.held is not None:
            self.on_verdict(lease)

    def on_verdict(self, lease: Lease) -> None:
        """The connection had ended before the daemon said why."""
        with self._lock:
            if lease.call is None or not lease.is_closed:
                return
            lease.held = None
        self.on_closed(lease)

    def _fail_waiting(self, lease: Lease, header: dict[str, Any]) -> None:
        with self._lock:
            waiting = self._queue.take_before(lease.home, lease.opened_at)
            self._retire(lease)
        for call in waiting:
            call.on_answer(header, Frame({}, b""))

    # -- the end -------------------------------------------------------------------------------------------

    def calls(self) -> list[LeasedCall]:
        """All that are not over."""
        with self._lock:
            return [*self._queue.calls(), *(lease.call for lease in self._leases if lease.call is not None)]

    @property
    def is_busy(self) -> bool:
        """A call is not over. Asked under the line's lock, so not under this one; who queues a call asks for the line's thread behind that."""
        return bool(self._queue) or any(lease.call is not None for lease in list(self._leases))

    @property
    def is_unused(self) -> bool:
        return not self._queue and not self._leases

    def fail_all(self, error: RemotedError) -> None:
        """There is no daemon: nothing that waits will be sent."""
        with self._lock:
            waiting = self._queue.take_all(self._queue.calls())
            for lease in [lease for lease in self._leases if not lease.is_granted]:
                self._retire(lease)
        for call in waiting:
            call.fail(error)

    def reopen(self) -> None:
        """There is a daemon again: what had been asked of the last one is asked again, and calls that nobody waits for are read.

        Leases may have outlived that one; of those that have not the worker says so itself.
        """
        with self._lock:
            self._provision.restart()
            for lease in self._leases:
                self._line.follow_lease(self, lease)
            self._attend_all()
            self._provide()

    def abandon(self) -> None:
        """In a forked child: the sockets are the parent's."""
        for lease in self._leases:
            lease.close()
