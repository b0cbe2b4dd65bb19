"""The HTTP routes that one client has registered; what their calls print and how they end is told to it.

News are dropped rather than kept for a client that does not read: nobody's answer depends on them.
"""

from __future__ import annotations

from remoted.access import Peer
from remoted.calls import Call
from remoted.data.messages import end_of, parse_route
from remoted.data.transport import Transport
from remoted.endpoints import Endpoint, Endpoints
from remoted_client import wire

_OUTPUT_CHUNK_BYTES = 48 * 1024


class Publishing:
    """The ``Owner`` of these routes."""

    def __init__(self, transport: Transport, endpoints: Endpoints, peer: Peer) -> None:
        self._transport = transport
        self._endpoints = endpoints
        self._peer = peer
        self._mine: list[Endpoint] = []

    @property
    def pid(self) -> int:
        return self._peer.pid

    def add(self, frame: wire.Frame) -> None:
        """Register what a frame describes, and say so. Raises Refused, KeyError, TypeError."""
        request = parse_route(frame)
        self._mine.append(self._endpoints.add(self._peer, str(frame.header["method"]), str(frame.header["path"]), request, frame.body, self))
        self._transport.send({"op": "routed", "key": request.key, "process": self.pid})

    def stop(self) -> None:
        """The client is gone, and its routes with it."""
        mine, self._mine = self._mine, []
        for endpoint in mine:
            self._endpoints.drop(endpoint)

    # -- an owner ------------------------------------------------------------------------------------------

    def on_output(self, stream: int, data: bytes) -> None:
        for start in range(0, len(data), _OUTPUT_CHUNK_BYTES):
            if self._transport.is_open and self._transport.has_room_for_output:
                self._transport.send({"op": "output", "stream": stream}, data[start : start + _OUTPUT_CHUNK_BYTES])

    def on_served(self, endpoint: Endpoint, status: int, seconds: float, call: Call | None) -> None:
        if self._transport.is_open and self._transport.has_room_for_output:
            news = {"method": endpoint.method, "path": endpoint.path, "status": status, "seconds": round(seconds, 6)}
            error = {"id": call.id, "error": end_of(call.error), "traceback": end_of(call.traceback)} if call is not None else {}
            self._transport.send({"op": "served", **news, **error})
