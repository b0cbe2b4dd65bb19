"""Worker processes: start one, run attempts in it, stop them, end it, and never guess how it ended.

Liveness comes from the pidfd and the end of the channel, never from a timer. Output is read from two pipes and
belongs to the attempt that runs; when the worker says DONE it has flushed, so the pipes are read dry before the
attempt is over. A worker may have the next few attempts already (``workload``); where its output would be taken for
theirs it waits for our word before it begins the next. A worker that ends takes its whole process tree with it *before*
anybody hears that it ended: its devices may then be lent again (promise 9).

Stopping an attempt is a ladder (MECHANISMS 13): the runtime interrupts the body; after 3 s TERM; after 10 s the
tree is killed. A worker that survives a stop loses every process younger than the attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable

from remoted import channel
from remoted.attempts import AttemptEnd, AttemptListener, AttemptSpec, LeaseSpec, clean, died
from remoted.clock import Clock
from remoted.cradle import Birth
from remoted.errors import SpawnError
from remoted.family import Family
from remoted.fdstore import Handles
from remoted.limits import Limits
from remoted.model import AttemptToken, Reason, WorkerId
from remoted.orders import Orders
from remoted.pipes import Pipes, Unread
from remoted.progress import Progress
from remoted.replies import Hello, close_payload, parse_end, parse_hello, payload_of, size_of
from remoted.spawn import launch, reaper
from remoted.spawn.births import Births, Born, Start
from remoted.spawn.door import parent_of
from remoted.spawn.memory import PROBABLY, MemoryKills, counter_of
from remoted.spool import Spool
from remoted.workload import Attempt, Workload
from remoted_client import wire

log = logging.getLogger(__name__)
_EARLY_BYTES = 64 * 1024
#: The kernel counts start times in ticks of 10 ms.
_TICK_SECONDS = 0.02


class Worker:
    """One process and what runs in it."""

    def __init__(self, worker_id: WorkerId, clock: Clock, limits: Limits, memory_kills: MemoryKills, on_dead: Callable[[Worker], None]) -> None:
        self.id = worker_id
        self.hello: Hello | None = None
        self.pid = 0
        self.started_at = clock.wall()
        #: Seconds since boot; with pid and boot id it names the process unmistakably. And how it began; None until it has.
        self.born = 0.0
        self.born_as: Born | None = None
        self.calls_done = 0
        self.drops = 0  #: Of instances, that it was told of.
        self._clock = clock
        self._limits = limits
        self._on_dead = on_dead
        self._loop = asyncio.get_running_loop()
        self._channel: channel.Channel | None = None
        self._process: launch.Process | None = None
        self._pipes = Pipes(self._deliver)
        self._workload = Workload()
        self._positions = 0
        self._progress: Progress | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._orders: Orders | None = None
        self._greeted: asyncio.Future[Hello] = self._loop.create_future()
        self._gone: asyncio.Future[reaper.ExitStatus] = self._loop.create_future()
        self._early_output = bytearray()
        #: Why it was killed, if it was killed here.
        self._kill_reason, self._exited = "", False
        self.family = Family(worker_id)
        self._sent: set[int] = set()
        self._memory_kills = memory_kills
        #: Why the kernel killed it, if it was for want of memory.
        self._want_of_memory = ""

    # -- birth ---------------------------------------------------------------------------------------------

    async def start(self, births: Births, birth: Birth, spool: Spool) -> Hello:
        """Be born and wait for the greeting. Raises SpawnError with what the process printed."""
        self.family = birth.family
        try:
            self._progress = Progress(spool.progress_path(self.id))
            self._channel = await self._be_born(births, birth.start)
            self._orders = Orders(self._channel, self.id, self._limits)
            self._channel.send({"op": "limits", **birth.first_words()}, fds=(os.dup(self._progress.fd), *spool.open(self.id)))
            hello = await asyncio.wait_for(self._greeted, self._limits.start_deadline_seconds)
            if parent_of(self.pid) != os.getpid():
                raise SpawnError("it is no child of the daemon, so nobody could say how it ends")
            return hello
        except (TimeoutError, SpawnError, OSError) as error:
            await self.end("it did not start", grace_seconds=0)
            detail = bytes(self._early_output[-4000:]).decode("utf-8", "replace").strip()
            text = str(error) or f"it did not answer within {self._limits.start_deadline_seconds:g} s"
            raise SpawnError(f"cannot start a worker with {birth.start.python}: {text}" + (f"\n{detail}" if detail else "")) from error

    async def _be_born(self, births: Births, start: Start) -> channel.Channel:
        ends = self._pipes.open()
        try:
            born = self.born_as = await births.bear(start, *ends)
        finally:
            wire.close_all(ends)
        self._process = born.process
        self.pid = self._process.pid
        self.family.begin(self.pid)
        self.born = reaper.started_at(self.pid)
        self._loop.add_reader(self._process.pidfd, self._on_exit)
        self._pipes.watch()
        return channel.Channel(born.sock, self._on_frame, self._on_channel_closed)

    # -- attempts ------------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        return self._process is not None and not self._gone.done()

    def handles(self) -> Handles | None:
        """What is held of it, for the next daemon; None when it has closed something already."""
        with contextlib.suppress(KeyError):
            if self._process is not None and self._channel is not None and self._channel.is_open:
                return Handles(self._channel.fileno(), self._process.pidfd, *self._pipes.ends)
        return None

    def take_position(self) -> int:
        """For the next call that is meant for it: they are sent in this order."""
        self._positions += 1
        return self._positions

    def run(self, spec: AttemptSpec, listener: AttemptListener, inline: bool) -> None:
        """Send everything the attempt needs; the listener hears of it from now on."""
        assert self._orders is not None
        attempt = Attempt(spec.token, listener, self._clock.boottime(), spec.position, spec.work.timeout_seconds)
        self._workload.add(attempt, spec.ahead)
        if spec.ahead and not self._workload.is_ahead(attempt):
            listener.on_begin()  # those before it have ended while it was being stored
        try:
            self._orders.run(spec, inline)
        except OSError as error:
            self._cannot_read(spec.token, error)
            return
        if not self._was_sent(attempt):
            return
        if not self._workload.is_ahead(attempt):
            self._set_timeout(attempt)
        else:
            self._pipes.watch(False)  # whose it is, only the worker can say
            if self._patience is None:
                self._have_patience()

    def _set_timeout(self, attempt: Attempt) -> None:
        if attempt.timeout_seconds is not None and not attempt.timers:
            attempt.timers.append(self._loop.call_later(attempt.started + attempt.timeout_seconds - self._clock.boottime(), self.stop, attempt.token, Reason.TIMEOUT))

    def lend(self, spec: LeaseSpec, listener: AttemptListener) -> None:
        """Hand a client's connection over: its calls come straight here until the lease ends."""
        assert self._orders is not None
        attempt = Attempt(spec.token, listener, self._clock.boottime())
        self._workload.add(attempt, ahead=False)
        try:
            self._orders.lend(spec)
        except OSError as error:
            self._cannot_read(spec.token, error)
        else:
            self._was_sent(attempt)

    def revoke(self, token: AttemptToken) -> None:
        """The lease ends as soon as the call in hand does."""
        if self._workload.find(token) is not None:
            self._tell({"op": "revoke", "attempt": token})

    def _cannot_read(self, token: AttemptToken, error: OSError) -> None:
        self._loop.call_soon(self._end_attempt, token, AttemptEnd("died", message=f"cannot read what the call needs: {error}", reason=Reason.LOST))

    def _was_sent(self, attempt: Attempt) -> bool:
        """Did it go to a living worker? Else its listener hears of its end soon."""
        assert self._channel is not None
        if not self._channel.is_open and (self.calls_done or self._workload.is_ahead(attempt)):
            # Nothing of this reached anybody, so it is no attempt. (One that never worked counts: it may never.)
            self._workload.remove(attempt.token)
            self._loop.call_soon(attempt.listener.on_end, AttemptEnd("stale", message="the worker had ended before the call was sent"))
        elif not self.is_alive:
            self._loop.call_soon(self._end_attempt, attempt.token, self._died(self._gone.result() if self._gone.done() else reaper.ExitStatus()))
        else:
            return True
        return False

    def stop(self, token: AttemptToken, why: Reason) -> None:
        """Begin the ladder: interrupt, TERM, KILL. Asking again changes nothing."""
        attempt = self._workload.find(token)
        if attempt is None or attempt.stopped_by is not None or self._channel is None:
            return
        if self._workload.is_ahead(attempt):
            attempt.stopped_by = why
            self._recall((attempt,))
        else:
            self.recall()  # what is cleaned up after it must not meet those behind it
            self._stop(attempt, token, why)

    def stop_leased(self, token: AttemptToken, number: int, began: float, is_running: Callable[[], bool], why: Reason) -> None:
        """The same for one call of a lease, which ends with it. ``began``: seconds since boot."""
        attempt = self._workload.find(token)
        if attempt is None or attempt.stopped_by is not None:
            return
        attempt.started, attempt.is_running = began, is_running
        self.revoke(token)
        self._stop(attempt, f"{token}/{number}", why)

    def _stop(self, attempt: Attempt, name: str, why: Reason) -> None:
        attempt.stopped_by = why
        attempt.cancel_timers()
        self._tell({"op": "cancel", "attempt": name, "why": why.value})
        attempt.timers.append(self._loop.call_later(self._limits.cancel_term_seconds, self._strike, signal.SIGTERM, attempt))
        attempt.timers.append(self._loop.call_later(self._limits.cancel_kill_seconds, self._strike, signal.SIGKILL, attempt))

    def _strike(self, number: int, attempt: Attempt | None = None) -> None:
        """Signal it, after a look at its family: who cleared its environment and left the session is not found later."""
        self._loop.create_task(self._look_and_signal(number, attempt))

    async def _look_and_signal(self, number: int, attempt: Attempt | None) -> None:
        await self.family.look()
        if attempt is None or (attempt.timers and attempt.is_running()):  # else its body has listened meanwhile
            self._signal(number)

    def _signal(self, number: int) -> None:
        if self._process is not None and not self._exited:
            self._sent.add(number)
            reaper.send(self._process.pidfd, number)

    def credit(self, token: AttemptToken, items: int) -> None:
        """The caller has read so many items of a stream."""
        self._tell({"op": "credit", "attempt": token, "items": items})

    def forget_item(self, token: AttemptToken, number: int) -> None:
        """It is stored, and so is everything before it; the worker need not repeat it."""
        self._tell({"op": "forget_item", "attempt": token, "number": number})

    def close_stream(self, token: AttemptToken) -> None:
        """The caller left its loop: GeneratorExit at the next yield, then the ladder."""
        if (attempt := self._workload.find(token)) is None:
            return
        self._tell({"op": "close_stream", "attempt": token})
        attempt.timers.append(self._loop.call_later(self._limits.cancel_term_seconds, self.stop, token, Reason.CANCELLED))

    def acknowledge(self, token: AttemptToken) -> None:
        """The outcome is committed; the worker may forget it."""
        if self._orders is not None:
            self._orders.acknowledge(token)

    def drop_instance(self, instance: str) -> None:
        self.drops += 1
        self._tell({"op": "drop", "instance": instance})

    def _tell(self, order: dict[str, object]) -> None:
        if self._channel is not None:
            self._channel.send(order)

    # -- running ahead -------------------------------------------------------------------------------------

    @property
    def ahead_count(self) -> int:
        """How many attempts it has that have not begun."""
        return self._workload.ahead_count

    def recall(self) -> None:
        """Take back what has not begun: what runs lasts, waits for another call, or is stopped."""
        self._recall(self._workload.ahead)

    def _recall(self, attempts: Iterable[Attempt]) -> None:
        """The worker says which of these it will not begin any more; the others it has begun, or will have ended soon."""
        if tokens := [attempt.token for attempt in attempts]:
            self._tell({"op": "recall", "attempts": tokens})

    def _on_recalled(self, tokens: list[object]) -> None:
        """The last one first, so that they go back in order. One may count as begun here: the end of the one before came with this."""
        for attempt in filter(None, map(self._workload.find, reversed(tokens))):
            self._return(attempt)

    def _return(self, attempt: Attempt) -> None:
        self._end_attempt(attempt.token, AttemptEnd("unbegun", message="the worker had not begun it", stopped_by=attempt.stopped_by))

    def _begin_next(self) -> None:
        """What had begun is over: the worker is at the next one."""
        if (attempt := self._workload.take_next()) is None:
            return
        attempt.started = self._clock.boottime()
        attempt.listener.on_begin()
        if attempt.stopped_by is not None:
            self._stop(attempt, attempt.token, attempt.stopped_by)
        elif self._patience is None or (attempt.timeout_seconds or 1.0) < 1.0:
            self._set_timeout(attempt)  # else when it turns out to last: hardly any of these gets so far

    def _have_patience(self) -> None:
        self._patience = self._loop.call_later(self._limits.ahead_patience_seconds, self._lose_patience, self._workload.newest_begun)

    def _lose_patience(self, before: Attempt | None) -> None:
        """Whoever still runs after all this time is no short call: the others need not wait for it."""
        self._patience = None
        if (attempt := self._workload.newest_begun) is None:
            return
        if attempt is before:
            self._set_timeout(attempt)
            attempt.listener.on_lasting()
            self.recall()
        else:
            self._have_patience()

    # -- what the worker says ------------------------------------------------------------------------------

    def _on_frame(self, frame: wire.Frame) -> None:
        """Only an attempt that this worker runs may be answered (T34); anything else is dropped."""
        header = frame.header
        try:
            attempt = self._workload.find(header.get("attempt", ""))
            if frame.op == "done":
                self._on_done(attempt, frame)
                return
            if frame.op == "hello" and not self._greeted.done():
                self.hello = parse_hello(header)
                self._greeted.set_result(self.hello)
            elif frame.op == "output" and attempt is not None and header["stream"] in (1, 2):
                attempt.listener.on_output(header["stream"], frame.body)
            elif frame.op == "item" and attempt is not None:
                attempt.listener.on_item(int(header["number"]), payload_of(frame), size_of(frame))
                return
            elif frame.op == "recalled":
                self._on_recalled(header["attempts"])
            elif frame.op == "mark" and attempt is not None:
                self._pipes.drain()
                attempt.listener.on_mark(int(header["number"]))
            elif frame.op == "lease_ended" and attempt is not None:
                self._conclude(attempt, AttemptEnd(clean(header["kind"]), message=clean(header["message"]), stopped_by=attempt.stopped_by))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, wire.WireError) as error:
            self.break_off(repr(error))
        frame.close()

    def break_off(self, why: str) -> None:
        """Nothing that it says is of use any more, and it may go on to say a lot."""
        self._kill(f"it broke the protocol: {why}")

    def _kill(self, why: str) -> None:
        """Once, and not without a word in the log: its user hears of it only if it ran something."""
        if not (self._kill_reason or self._exited):
            self._kill_reason = why
            log.warning("worker %s (pid %d) is killed: %.300s", self.id, self.pid, why)
            self._strike(signal.SIGKILL)

    def _on_done(self, attempt: Attempt | None, frame: wire.Frame) -> None:
        waits = bool(frame.header.get("waits"))
        if attempt is None:
            frame.close()
        else:
            self._conclude(attempt, parse_end(frame, attempt.stopped_by), waits or not (frame.header.get("dry") or self._workload.ahead_count))
        if waits:
            self._tell({"op": "go_on", "attempt": frame.header["attempt"]})

    def _conclude(self, attempt: Attempt, end: AttemptEnd, printed: bool = True) -> None:
        """What it printed was flushed before the worker said this; what a stop left running dies first."""
        self.calls_done += 1
        if printed:
            self._pipes.drain()
        if attempt.stopped_by is None:
            self._end_attempt(attempt.token, end)
        else:
            attempt.cancel_timers()
            self._loop.create_task(self._clean_up(attempt, end))

    async def _clean_up(self, attempt: Attempt, end: AttemptEnd) -> None:
        """The worker survived a stop: what the attempt started does not."""
        await self.family.end_younger(attempt.started - _TICK_SECONDS)
        self._end_attempt(attempt.token, end)

    def _end_attempt(self, token: str, end: AttemptEnd) -> None:
        if (attempt := self._workload.remove(token)) is None:
            close_payload(end.payload)
            return
        if attempt.timers:
            attempt.cancel_timers()
        attempt.listener.on_end(end)
        self._begin_next()
        if not self._workload.ahead_count:
            self._pipes.watch()

    def _deliver(self, stream: int, said: Unread) -> None:
        if (attempt := self._workload.newest_begun) is not None:
            attempt.listener.on_output(stream, said)
        else:
            self._early_output += said.data[: _EARLY_BYTES - len(self._early_output)]

    # -- the end -------------------------------------------------------------------------------------------

    def _on_channel_closed(self, why: str) -> None:
        """A worker without a channel is of no use, whatever it still does."""
        if self._process is not None:
            self._loop.call_later(0.2, self._fail_greeting, why)
        self._loop.call_later(self._limits.cancel_term_seconds, self._kill, f"{why}, and it did not end after that")

    def _fail_greeting(self, why: str) -> None:
        if not self._greeted.done():
            self._greeted.set_exception(ConnectionError(why))
            self._greeted.exception()

    def _on_exit(self) -> None:
        assert self._process is not None
        self._exited = True  # its pidfd is closed soon, and the number means another one
        self._loop.remove_reader(self._process.pidfd)
        self._loop.create_task(self._bury())

    async def _bury(self) -> None:
        """Everything below the dead worker dies, then its attempts are told, then the engine."""
        assert self._process is not None
        counter = counter_of(self.pid)  # not yet reaped, it still says where it was
        status = reaper.reap(self._process.pidfd)
        if status.signal == signal.SIGKILL and signal.SIGKILL not in self._sent:
            self._want_of_memory = self.family.explain_kill() or (PROBABLY if self._memory_kills.explain(counter) else "")
        os.close(self._process.pidfd)
        await self.family.bury()
        if self._channel is not None:
            self._channel.drain()
            self._channel.close()
        self._pipes.drain()
        self._pipes.close()
        self._fail_greeting(f"it {status.describe()}")
        self._gone.set_result(status)
        self._end_all(status)
        self._on_dead(self)

    def _end_all(self, status: reaper.ExitStatus) -> None:
        """Whatever it may have begun died with it; the rest was only on its way, and goes back to its line in order."""
        begun = self._progress.read().position if self._progress is not None else 0
        for attempt in reversed(self._workload.ahead):
            if attempt.position > begun:
                self._return(attempt)
        for attempt in self._workload:
            self._end_attempt(attempt.token, self._died(status, attempt.stopped_by))
        if self._progress is not None:
            self._progress.close()

    def _died(self, status: reaper.ExitStatus, stopped_by: Reason | None = None) -> AttemptEnd:
        why = f": {self._kill_reason}" if self._kill_reason and status.signal == signal.SIGKILL else ""
        return died(status.describe() + why, status.code, self._want_of_memory, stopped_by)

    @property
    def has_attempts(self) -> bool:
        return bool(self._workload)

    @property
    def begun_since(self) -> float:
        """What is older than this in its family was started by nobody who still runs. Seconds since boot."""
        return self._workload.begun_since - _TICK_SECONDS

    @property
    def runs_on(self) -> bool:
        """Something runs here that nobody has stopped."""
        return any(attempt.stopped_by is None for attempt in self._workload)

    def leave(self) -> None:
        """The daemon ends and what runs here goes on, as after the daemon's sudden death: nobody hears of it any more.

        The pipes go before the channel: from its end on, unless systemd keeps it, the worker reads them itself (MECHANISMS 4).
        """
        timers = [timer for attempt in self._workload for timer in attempt.timers]
        for timer in (*timers, *([self._patience] if self._patience else [])):
            timer.cancel()
        if self._orders is not None:
            self._orders.send_acknowledged()
        self._pipes.drain()
        self._pipes.close()
        if self._process is not None and not self._exited:
            self._loop.remove_reader(self._process.pidfd)
        if self._channel is not None:
            self._channel.close(goes_on=True)

    async def end(self, why: str, grace_seconds: float = 3.0) -> None:
        """Ask it to leave, then kill the tree. Returns when it is buried."""
        self._kill_reason = self._kill_reason or why
        if self._process is None:
            for part in (self._channel, self._progress, self._pipes):
                if part is not None:
                    part.close()
            self.family.forget()
            return
        await self.family.look()
        if self._channel is not None and grace_seconds:
            if self._orders is not None:
                self._orders.send_acknowledged()
            self._channel.send({"op": "end"})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._gone), grace_seconds)
                return
        await self.family.end()
        self._signal(signal.SIGKILL)
        await asyncio.shield(self._gone)
