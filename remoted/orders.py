"""What is sent to a worker so that it can run an attempt or serve a lease; content that it has is not sent again."""

from __future__ import annotations

import asyncio

from remoted.attempts import AttemptSpec, Content, LeaseSpec, Work
from remoted.channel import Channel
from remoted.limits import Limits
from remoted.model import AttemptToken, WorkerId
from remoted_client import wire

_ACKNOWLEDGED_MOST = 512
_ACKNOWLEDGED_SECONDS = 0.02


class Orders:
    """One worker's. Raises OSError where content cannot be read; nothing of the order itself was sent then."""

    def __init__(self, channel: Channel, worker: WorkerId, limits: Limits) -> None:
        self._channel = channel
        self._worker = worker
        self._limits = limits
        self._known: set[str] = set()
        #: What the newest order shares with its neighbours, in our words and in the worker's.
        self._newest: tuple[Work | None, tuple[object, ...], dict[str, object]] = (None, (), {})
        self._acknowledged: list[AttemptToken] = []
        self._timer: asyncio.TimerHandle | None = None

    def acknowledge(self, token: AttemptToken) -> None:
        """Told a little later, with others: it may be at the next call by then, and to wake it costs more than it is worth."""
        self._acknowledged.append(token)
        if len(self._acknowledged) >= _ACKNOWLEDGED_MOST:
            self.send_acknowledged()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_ACKNOWLEDGED_SECONDS, self._acknowledge_late)

    def _acknowledge_late(self) -> None:
        self._timer = None
        self.send_acknowledged()

    def send_acknowledged(self) -> None:
        tokens, self._acknowledged = self._acknowledged, []
        if tokens:
            self._channel.send({"op": "ack", "attempts": tokens})

    def run(self, spec: AttemptSpec, inline: bool) -> None:
        word, inline_arguments = [spec.token, spec.call_id, spec.position], spec.arguments.inline
        beside = (inline, self._limits.stream_items, self._limits.stream_bytes)
        if self._newest[0] is not spec.work or self._newest[1] != beside:
            self._newest = (spec.work, beside, self._common(spec.work, inline))
        common = self._newest[2]
        if inline_arguments is not None and len(inline_arguments) <= wire.INLINE_BYTES:
            self._channel.send_call(common, word, inline_arguments)
            if not spec.ahead:
                self._channel.end_calls()  # whether it arrives decides what becomes of it
        else:
            self._send({**common, "calls": [word], "sizes": [0]}, spec.arguments)

    def _common(self, work: Work, inline: bool) -> dict[str, object]:
        """What an order shares with its neighbours; the worker has the content then."""
        for content in (work.code, work.modules, work.context, work.constructor):
            if content is not None:
                self._teach(content)
        common: dict[str, object] = {
            "op": "run",
            "code": work.code.digest,
            "modules": work.modules.digest if work.modules else "",
            "context": work.context.digest,
            "stream": work.stream,
            **self._window,
            "inline": inline,
            "concurrent": work.concurrent,
            "kept": work.is_kept,
            "raw": work.is_raw,
            "plain": work.is_plain,
        }
        if work.instance is not None:
            common["instance"] = {**work.instance, "constructor": work.constructor.digest if work.constructor else ""}
        return common

    def lend(self, spec: LeaseSpec) -> None:
        """The descriptors are the worker's, or closed."""
        try:
            self._teach(spec.context)
        except OSError:
            wire.close_all((spec.connection, spec.page))
            raise
        header = {"op": "lease", "attempt": spec.token, "lease": spec.lease_id, "spec": spec.spec, "context": spec.context.digest, "worker": self._worker, "concurrent": spec.concurrent}
        self._channel.send({**header, **self._window}, fds=(spec.connection, spec.page))

    @property
    def _window(self) -> dict[str, object]:
        """How far generators may run ahead of their readers."""
        return {"window_items": self._limits.stream_items, "window_bytes": self._limits.stream_bytes}

    def _teach(self, content: Content) -> None:
        if content.digest not in self._known:
            self._send({"op": "content", "digest": content.digest}, content)
            self._known.add(content.digest)

    def _send(self, header: dict[str, object], content: Content) -> None:
        if content.inline is not None and len(content.inline) <= wire.INLINE_BYTES:
            self._channel.send(header, content.inline)
        elif content.inline is not None:
            self._channel.send(header, fds=(wire.memfd("remoted-arguments", content.inline),))
        else:
            self._channel.send(header, fds=(content.open(),))
