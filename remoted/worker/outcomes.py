"""What became of a call, on its way out: to the daemon, to the client of a lease, or into a file when nobody is there."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from typing import Any, BinaryIO, cast

from remoted_client import codec, parcel, plain, wire
from remoted_client.payload import PayloadWriter
from remoted_client.segments import Collector, Segment, SegmentPool

from .calls import Outcome, Run, add_note, raised, shorten
from .lease import Lease
from .link import Link
from .refusals import Refusals
from .streams import StandardStreams

Payload = bytes | int
_PLAIN = {"plain": True}
_CONSTRUCTED = {"constructed": True}


class Reporter:
    """Encodes results and hands them over; keeps those of jobs until the daemon has committed them."""

    def __init__(self, link: Link, streams: StandardStreams, decoder: codec.Decoder, segments: SegmentPool) -> None:
        self._link = link
        self._streams = streams
        self._decoder = decoder
        self._segments = segments
        self._may_go_on = threading.Event()
        self.refusals = Refusals()
        self._unacknowledged: dict[str, tuple[Run, dict[str, Any], Payload, float]] = {}
        #: Items of streams that are not stored yet, by attempt and number.
        self._items: dict[str, dict[int, Payload]] = {}
        #: Items are taken in their order only: none may be sent while older ones are repeated.
        self._sending_items = threading.Lock()
        #: Whose outcome the daemon has to answer before the next call begins.
        self._waits_for = ""
        #: Where outcomes are left when no daemon is there.
        self._spool = -1

    def report(self, run: Run, outcome: Outcome, why: str) -> None:
        """Flush, encode, tell; what cannot be encoded becomes an error that names it. ``why`` it was stopped, or "".

        The next call may be here already, and the daemon must not ascribe to it what this one printed: it has its word first.
        """
        self._streams.flush()
        if run.lease is not None:
            self._answer(run, run.lease, outcome, why)
            return
        self._streams.restore()
        try:
            payload = self.encode_for(run, outcome.value) if outcome.kind == "returned" else self.encode(outcome.value)
        except BaseException as error:
            outcome = self._unsendable(error, why)
            payload = self.encode(outcome.value)
        is_asked = not (run.is_concurrent or run.inline)
        waits = is_asked and self._streams.take_printed()
        if waits:
            self._waits_for = run.attempt
            self._may_go_on.clear()
        self._tell_daemon(run, outcome, payload, waits, printed=waits or not is_asked)
        if waits and not self._link.closed:
            self._may_go_on.wait()
        self._waits_for = ""

    def go_on(self, attempt: str = "") -> None:
        """The daemon has read what this one printed; without a name: it will never read anything."""
        if attempt in ("", self._waits_for):
            self._may_go_on.set()

    def raised(self, error: BaseException, why: str) -> Outcome:
        """The outcome of a body that ended with an exception."""
        if note := self.refusals.explain(error):
            add_note(error, note)
        return raised(error, self._survives, bool(why))

    def encode(self, value: Any, buffers: Collector | None = None) -> Payload:
        """The value, pickled: bytes while small, else a memfd (it may be larger than half of the memory)."""
        writer = PayloadWriter()
        try:
            self._decoder.encode_result(value, cast("BinaryIO", writer), buffer_callback=buffers)
        except BaseException:
            writer.abandon()
            raise
        return writer.take()

    def encode_for(self, run: Run, value: Any) -> Payload:
        """A result or an item: pickled, large buffers beside it, unless the call's bytes are meant to stay as they are."""
        if not run.is_raw:
            if (data := plain.dumps(value)) is not None:
                return data
            collector = Collector(wire.INLINE_BYTES)
            payload = self.encode(value, collector)
            return parcel.pack(payload, collector.buffers) if collector.buffers else payload
        writer = PayloadWriter()
        writer.write(value or b"")
        return writer.take()

    def _unsendable(self, error: BaseException, why: str) -> Outcome:
        outcome = self.raised(error, why)
        outcome.kind = "unsendable"
        return outcome

    def _survives(self, value: Any) -> bool:
        """Can the value be sent home and rebuilt there?"""
        try:
            buffer = io.BytesIO()
            self._decoder.encode_result(value, buffer)
            rebuilt = self._decoder.load_result(buffer.getvalue())
        except Exception:
            return False
        return type(rebuilt) is type(value)

    # -- to the client of a lease --------------------------------------------------------------------------

    def _answer(self, run: Run, lease: Lease, outcome: Outcome, why: str) -> None:
        said = None if run.instance is None or not run.instance.get("constructed") else _CONSTRUCTED
        if outcome.kind == "returned" and (data := plain.dumps(outcome.value)) is not None:
            self._send_answer(run, lease, said and {**said, **_PLAIN}, data)
            return
        try:
            header, payload, segment = self._encode_apart(outcome.value, run.copies, is_result=outcome.kind == "returned")
        except BaseException as error:
            outcome = self._unsendable(error, why)
            header, payload, segment = {}, self.encode(outcome.value), None
        outcome.value = None  # gone before the caller hears what is free again
        if outcome.kind != "returned":
            header |= {"why": why, **_described(outcome)}
        if outcome.kind == "stale":
            lease.is_stale = True
            lease.revoke()
        self._send_answer(run, lease, {**header, **(said or {})}, payload, segment)

    def _encode_apart(self, value: Any, copies: bool, is_result: bool = True) -> tuple[dict[str, Any], Payload, Segment | None]:
        """The pickle, the large buffers that stay out of it, and what a header says of both. Raises QuotaExceeded, and what pickling raises."""
        if is_result and (data := plain.dumps(value)) is not None:
            return dict(_PLAIN), data, None
        if copies:
            return {}, self.encode(value), None
        collector = Collector()
        payload = self.encode(value, collector)
        if not collector.buffers:
            return {}, payload, None
        try:
            segment = self._segments.pack(collector.buffers)
        except BaseException:
            close_payload(payload)
            raise
        return {"segment": segment.number, "buffers": len(collector.buffers)}, payload, segment

    def send_item(self, run: Run, lease: Lease, item: Any) -> bool:
        """One of a stream. False when its caller wants no more."""
        assert lease.window is not None
        header, payload, segment = self._encode_apart(item, run.copies)
        size = len(payload) if isinstance(payload, bytes) else os.fstat(payload).st_size
        if not lease.window.take(size + (segment.capacity if segment else 0)):
            close_payload(payload)
            if segment is not None:
                self._segments.take_back(segment.number)
            return False
        lease.say(run.number, {"op": "item", **header}, payload, segment)
        return True

    def _send_answer(self, run: Run, lease: Lease, header: dict[str, Any] | None, payload: Payload, segment: Segment | None = None) -> None:
        """By the daemon goes only that all of the output is out. Without a header: a plain value."""
        if self._streams.take_printed():
            self._link.send({"op": "mark", "attempt": lease.token, "number": run.number})
            header = {**(_PLAIN if header is None else header), "printed": True}
        lease.answer(run.number, header, payload, segment)
        self._streams.restore_soon()  # while the caller reads the answer
        if run.answered is not None:
            run.answered.set()

    # -- to the daemon -------------------------------------------------------------------------------------

    def _tell_daemon(self, run: Run, outcome: Outcome, payload: Payload, waits: bool, printed: bool) -> None:
        constructed = bool(run.instance and run.instance.get("constructed"))
        header: dict[str, Any] = {"op": "done", "attempt": run.attempt}
        if constructed or outcome.kind != "returned":  # else the daemon knows the rest
            header |= {"exit_code": outcome.exit_code, "constructed": constructed, **_described(outcome)}
        if waits:
            header["waits"] = True
        elif not printed:
            header["dry"] = True  # the daemon need not look into the pipes
        # Kept until the daemon has committed it: what lies unread in a dead daemon's socket is lost.
        self._unacknowledged[run.attempt] = (run, header, _copied(payload), time.time())
        self._link.send_payload(header, payload)

    def tell_item(self, run: Run, number: int, payload: Payload) -> bool:
        """One of a stream's; False when nobody takes any."""
        with self._sending_items:
            if run.is_kept:
                self._items.setdefault(run.attempt, {})[number] = _copied(payload)
            return self._link.send_payload({"op": "item", "attempt": run.attempt, "number": number}, payload)

    def forget_item(self, attempt: str, number: int) -> None:
        """It is stored, and so is everything before it."""
        payload = self._items.get(attempt, {}).pop(number, b"")
        close_payload(payload)

    def repeat(self) -> None:
        """There is another daemon: everything that the last one may not have stored is said once more, in the same words, and when it was."""
        with self._sending_items:
            for attempt, kept in list(self._items.items()):
                for number, payload in list(kept.items()):
                    self._link.send_payload({"op": "item", "attempt": attempt, "number": number}, _copied(payload))
        for attempt, (_, header, payload, ended_at) in list(self._unacknowledged.items()):
            said = {name: value for name, value in header.items() if name != "dry" and (name != "waits" or attempt == self._waits_for)}
            self._link.send_payload({**said, "ended_at": ended_at}, _copied(payload))

    def acknowledged(self, attempt: str) -> None:
        """The outcome is committed: nobody will ask for it again."""
        kept = self._unacknowledged.pop(attempt, None)
        if kept is not None:
            close_payload(kept[2])
        for payload in self._items.pop(attempt, {}).values():
            close_payload(payload)

    def leave_in(self, spool: int) -> None:
        """The descriptor of a file that the next daemon will read; this object's from here on."""
        self._spool = spool

    def leave_behind(self) -> None:
        """No daemon: the next one finds the outcomes in the file."""
        for run, header, payload, ended_at in list(self._unacknowledged.values()):
            if run.is_kept and self._spool >= 0:
                _write_outcome(self._spool, {**header, "ended_at": ended_at}, payload)


def _copied(payload: Payload) -> Payload:
    return payload if isinstance(payload, bytes) else os.dup(payload)


def close_payload(payload: Payload) -> None:
    if isinstance(payload, int):
        os.close(payload)


def _write_outcome(spool: int, header: dict[str, Any], payload: Payload) -> None:
    """The mark at its end comes when everything before it is on the disk: an outcome is there whole or not at all."""
    size = len(payload) if isinstance(payload, bytes) else os.fstat(payload).st_size
    head = json.dumps({**header, "payload_size": size}).encode()
    source: BinaryIO = io.BytesIO(payload) if isinstance(payload, bytes) else open(payload, "rb")
    with open(spool, "ab", closefd=False) as target, source:
        source.seek(0)
        target.write(len(head).to_bytes(4, "big") + head)
        while chunk := source.read(1 << 20):
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
        target.write(wire.OUTCOME_MARK)
        target.flush()
        os.fsync(target.fileno())


def _described(outcome: Outcome) -> dict[str, Any]:
    return {
        "kind": outcome.kind,
        "error_type": outcome.error_type[:1000],
        "message": shorten(outcome.message, 16 * 1024),
        "traceback": shorten(outcome.traceback, 24 * 1024, keep_end=True),
    }
