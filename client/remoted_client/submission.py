"""From a decorated function and its arguments to a call that is on its way.

Nothing here is imported before the first call: pickling, sockets and threads are not the business of a script
that only decorates.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remoted_client import context, parcel, plain
from remoted_client.call_state import CallState
from remoted_client.codec import UnpicklableError, expected_imports, function_identity
from remoted_client.connection import Connection, Outgoing, Upload, current
from remoted_client.errors import SerializationError
from remoted_client.handle import Handle, StreamHandle
from remoted_client.home import Home
from remoted_client.lease_pool import LeasePool
from remoted_client.leased_call import LeasedCall
from remoted_client.payload import FilePayload, Payload, PayloadWriter
from remoted_client.segments import Collector
from remoted_client.settings import Settings, blocks, name_of
from remoted_client.surroundings import current_directory, own_entries
from remoted_client.wire import INLINE_BYTES

if TYPE_CHECKING:
    from remoted_client.codec import Code


def start(function: Callable[..., Any], settings: Settings, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], stream: bool) -> Handle[Any]:
    """The handle of a call that is on its way."""
    state = submit(current(), function, settings, options, args, kwargs, stream=stream)
    return StreamHandle(state) if stream else Handle(state)


def submit(
    line: Connection,
    target: Callable[..., Any],
    settings: Settings,
    options: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    stream: bool,
    method: tuple[Home, str] | None = None,
    name: str = "",
) -> CallState:
    """Pickle, describe and start one call; of a ``method`` with the instance's home and its own name.

    Raises SerializationError naming what cannot be sent.
    """
    described = _describe(line, target, settings, stream)
    if described.is_load_balanced and context.running_call() is None and (not options or options.keys() <= _LEASED_OPTIONS):
        return _submit_leased(line, described, target, settings, options, args, kwargs, stream, method, name)
    code, (code_upload, spec_upload) = described.code, described.uploads
    plain_data = plain.dumps_arguments(args, kwargs)
    if plain_data is None:
        payload = encode_arguments(line, args, kwargs, code) if options.get("copy") else encode_parcel(line, args, kwargs, code)
    else:
        payload = Payload(plain_data)
    context_data, context_digest = line.surroundings.document(settings.declared)
    uploads = [spec_upload, code_upload, Upload(context_digest, "context", context_data)]
    modules = _modules_upload(code)
    if modules is not None:
        uploads.append(modules)
    if payload.digest:
        uploads.append(Upload(payload.digest, "arguments", payload))
    parent = context.running_call()
    common: dict[str, Any] = {
        "op": "call" if settings.config.is_load_balanced else "submit",
        "spec": spec_upload.digest,
        "code": code_upload.digest,
        "modules": modules.digest if modules else "",
        "context": context_digest,
        "arguments": payload.digest,
        "options": {name: value for name, value in options.items() if name != "copy"},
        "parent": parent.id if parent else "",
        "plain": plain_data is not None,
        "fresh": True,
    }
    if method is not None:
        home, method_name = method
        uploads.append(home.constructor)
        common["instance"] = [home.id, method_name, home.constructor.digest]
    state = CallState(
        options.get("name") or name or name_of(target),
        Outgoing(secrets.token_hex(16), common, payload.inline, tuple(uploads)),
        durable=not settings.config.is_load_balanced,
        detached=bool(options.get("detach")),
        stream=stream,
        echo=True,
    )
    state.workers_max = described.workers_max
    line.start(state)
    return state


#: What a call on a lease can be told; the others concern the daemon.
_LEASED_OPTIONS = frozenset({"name", "timeout_seconds", "max_retries", "copy"})


def _submit_leased(
    line: Connection, described: _Described, target: Callable[..., Any], settings: Settings, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], stream: bool,
    method: tuple[Home, str] | None, name: str,
) -> LeasedCall:  # fmt: skip
    """Straight to a worker, on a connection that the daemon has handed over."""
    plain_data = plain.dumps_arguments(args, kwargs)
    copies = bool(options and options.get("copy"))
    collector = None if copies or plain_data is not None else Collector()
    payload = encode_arguments(line, args, kwargs, described.code, collector) if plain_data is None else Payload(plain_data)
    data, digest = line.surroundings.document(settings.declared)
    route = described.route
    if route is None or route.context != digest or route.modules is not described.code.modules or route.line is not line or route.pool.is_forgotten:
        route = described.route = _route(line, described, target, settings, Upload(digest, "context", data))
    use, uploads, name = route.use, route.uploads, name or route.name
    if options:
        timeout, name = options.get("timeout_seconds") or described.timeout_seconds, options.get("name") or name
        use = (*use[:3], _milliseconds(timeout, described.execution_timeout_seconds))
    home, method_name = method or (None, "")
    if home is not None:
        use, uploads = (*use, home.id, method_name, home.constructor.digest), (*uploads, home.constructor)
    call = LeasedCall(name, route.pool, use, uploads, payload, plain_data is not None, stream)
    if home is not None:
        call.home = home
    call.workers_max = described.workers_max
    if copies:
        call.copies = True
    if collector is not None and collector.buffers:
        call.segment, call.buffers = line.segments.pack(collector.buffers), len(collector.buffers)
    route.pool.submit(call)
    return call


@dataclass(frozen=True)
class _Route:
    """Where calls of one target go, as long as neither its code nor its surroundings change."""

    line: Connection
    context: str
    modules: Any
    name: str
    pool: LeasePool
    use: tuple[Any, ...]
    uploads: tuple[Upload, ...]


def _route(line: Connection, described: _Described, target: Callable[..., Any], settings: Settings, context_upload: Upload) -> _Route:
    code_upload, spec_upload = described.uploads
    modules = _modules_upload(described.code)
    key = (described.pool_key, context_upload.digest)
    name = name_of(target)
    if key not in line.pools:
        if len(line.pools) >= _POOLS_MOST:  # a script that changes its environment at every call
            for old in [old for old, pool in line.pools.items() if pool.is_unused]:
                line.pools.pop(old).is_forgotten = True
        line.pools.setdefault(key, LeasePool(line, spec_upload, context_upload, name, settings.config.workersMax, 1 if described.is_alone else settings.config.max_concurrency))
    timeout_ms = _milliseconds(described.timeout_seconds, described.execution_timeout_seconds)
    use = (code_upload.digest, modules.digest if modules else "", context_upload.digest, timeout_ms)
    uploads = (code_upload, context_upload, *((modules,) if modules else ()))
    return _Route(line, context_upload.digest, described.code.modules, name, line.pools[key], use, uploads)


def _milliseconds(*limits: float | None) -> int:
    """The least of them; 0 means none."""
    return int(1000 * min((limit for limit in limits if limit is not None), default=0))


class _Described:
    """A target's content, as long as its code does not change."""

    def __init__(self, code: Code, document: dict[str, Any]) -> None:
        spec = json.dumps(document, sort_keys=True).encode()
        self.code = code
        self.is_load_balanced: bool = document["pool"]["load_balanced"]
        self.uploads = (Upload(hashlib.sha256(code.payload).hexdigest(), "code", code.payload), Upload(hashlib.sha256(spec).hexdigest(), "spec", spec))
        self.timeout_seconds: float | None = document["timeout_seconds"]
        self.workers_max: int = document["pool"]["workers_max"]
        self.execution_timeout_seconds: float | None = document["pool"]["execution_timeout_seconds"]

        self.route: _Route | None = None
        self.is_alone: bool = document["function"]["blocks"]
        shared = {name: value for name, value in document.items() if name not in ("function", "timeout_seconds", "max_retries", "stream")}
        #: Calls with the same key can share a lease.
        self.pool_key = json.dumps({**shared, "alone": self.is_alone}, sort_keys=True)


#: By the ids of target and settings, and whether the call streams. Both are kept, or another object could have the id of one that
#: is gone; the oldest go (functions made in a loop must not stay for ever).
_described: OrderedDict[tuple[int, int, bool], tuple[Any, Settings, _Described]] = OrderedDict()
_DESCRIBED_MOST = 1000
_POOLS_MOST = 100
_modules: list[tuple[Any, Upload]] = []


def _describe(line: Connection, target: Callable[..., Any], settings: Settings, stream: bool) -> _Described:
    """The target's code and spec; built again only when the code was."""
    try:
        code = line.encoder.encode_call_target(target)
    except UnpicklableError as error:
        raise SerializationError(str(error), getattr(error, "path", "")) from error
    key = (id(target), id(settings), stream)
    known = _described.get(key)
    if known is None or known[0] is not target or known[1] is not settings or known[2].code.payload is not code.payload:
        cwd = current_directory()
        is_alone = settings.config.max_concurrency > 1 and blocks(target)
        document = settings.spec(function_identity(target), expected_imports(target), stream, is_alone, cwd, own_entries(sys.path, cwd))
        known = _described[key] = (target, settings, _Described(code, document))
        if len(_described) > _DESCRIBED_MOST:
            _described.popitem(last=False)
    known[2].code = code
    return known[2]


def _modules_upload(code: Code) -> Upload | None:
    if not code.modules:
        return None
    if not _modules or _modules[0][0] is not code.modules:
        data = code.modules.to_bytes()
        _modules[:] = [(code.modules, Upload(hashlib.sha256(data).hexdigest(), "modules", data))]
    return _modules[0][1]


def encode_parcel(line: Connection, args: tuple[Any, ...], kwargs: dict[str, Any], code: Code) -> Payload:
    """As ``encode_arguments``, with large buffers beside the pickle in one memfd."""
    collector = Collector(INLINE_BYTES)
    payload = encode_arguments(line, args, kwargs, code, collector)
    if not collector.buffers:
        return payload
    return FilePayload(parcel.pack(payload.inline if payload.fd < 0 else os.dup(payload.fd), collector.buffers))


def encode_arguments(line: Connection, args: tuple[Any, ...], kwargs: dict[str, Any], code: Code | None, buffers: Collector | None = None) -> Payload:
    """With ``buffers`` large ones stay out of it. Raises SerializationError naming argument and attribute."""
    writer = PayloadWriter()
    try:
        line.encoder.encode_arguments_into(writer, args, kwargs, code, buffers)  # type: ignore[arg-type]
    except BaseException as error:
        writer.abandon()
        if isinstance(error, UnpicklableError):
            raise SerializationError(str(error), getattr(error, "path", "")) from error
        raise
    return writer.finish()


def constructor_upload(payload: Payload) -> Upload:
    """What an instance is constructed with."""
    if payload.digest:
        return Upload(payload.digest, "constructor", payload)
    return Upload(hashlib.sha256(payload.inline).hexdigest(), "constructor", payload.inline)
