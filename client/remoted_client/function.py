"""What ``@remote`` makes of a function: called, it starts a call and gives its handle."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import secrets
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from remoted_client import connection, context
from remoted_client.call_state import CallState
from remoted_client.connection import Connection, Outgoing, Upload
from remoted_client.errors import SerializationError
from remoted_client.handle import Handle, StreamHandle
from remoted_client.local import LocalHandle, LocalStream
from remoted_client.mapping import MapResult
from remoted_client.payload import Payload, PayloadWriter
from remoted_client.suggest import check_amount, check_int
from remoted_client.surroundings import own_entries

if TYPE_CHECKING:
    from remoted_client.codec import Code
    from remoted_client.config import ResourceConfig

P = ParamSpec("P")
H = TypeVar("H")


class Settings:
    """What the decorator was told, checked; shared by a function and all its ``options`` variants."""

    def __init__(
        self,
        config: ResourceConfig,
        dependencies: tuple[str, ...] = (),
        system_dependencies: tuple[str, ...] = (),
        accelerate_downloads: bool = False,
        env: dict[str, str | None] | None = None,
        max_retries: int = 1,
        timeout: float | None = 3600,
        local: bool = False,
        method: str | None = None,
        path: str | None = None,
    ) -> None:
        self.config = config
        self.dependencies = dependencies
        self.system_dependencies = system_dependencies
        self.accelerate_downloads = accelerate_downloads
        self.env = dict(env or {})
        self.max_retries = max_retries
        self.timeout = timeout
        self.local = local
        self.method = method
        self.path = path

    @property
    def declared(self) -> dict[str, str | None]:
        """``env=`` of the decorator over the config's over the template's."""
        return {**self.config.declared_env, **self.env}

    @property
    def runs_here(self) -> bool:
        return self.local or os.environ.get("REMOTED_LOCAL", "") not in ("", "0")

    def spec(self, identity: tuple[str, str, str], stream: bool, instance: bool) -> dict[str, Any]:
        """The document that all calls of one function share."""
        module, qualname, digest = identity
        return {
            "function": {"module": module, "qualname": qualname, "digest": digest},
            "pool": self.config.to_wire(),
            "dependencies": self.dependencies,
            "system_dependencies": self.system_dependencies,
            "accelerate_downloads": self.accelerate_downloads,
            "max_retries": 0 if self.config.is_load_balanced else self.max_retries,
            "timeout_seconds": self.timeout,
            "python": sys.version_info[:3],
            "executable": sys.executable,
            "stream": stream,
            "cwd": os.getcwd(),
            "sys_path": own_entries(sys.path, os.getcwd()),
            "declared": sorted(self.declared),
        }


def submit(
    line: Connection,
    target: Callable[..., Any],
    settings: Settings,
    options: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    stream: bool,
    instance: tuple[str, str, Payload] | None = None,
    name: str = "",
) -> CallState:
    """Pickle, describe and start one call. Raises SerializationError naming what cannot be sent."""
    code, code_upload, spec_upload = _describe(line, target, settings, stream, instance is not None)
    payload = encode_arguments(line, args, kwargs, code)
    context_data, context_digest = line.surroundings.document(settings.declared)
    uploads = [spec_upload, code_upload, Upload(context_digest, "context", context_data)]
    modules = _modules_upload(code)
    if modules is not None:
        uploads.append(modules)
    if payload.digest:
        uploads.append(Upload(payload.digest, "arguments", payload))
    parent = context.running_call()
    header: dict[str, Any] = {
        "op": "call" if settings.config.is_load_balanced else "submit",
        "key": secrets.token_hex(16),
        "spec": spec_upload.digest,
        "code": code_upload.digest,
        "modules": modules.digest if modules else "",
        "context": context_digest,
        "arguments": payload.digest,
        "options": options,
        "parent": parent.id if parent else "",
    }
    if instance is not None:
        constructor = _constructor_upload(instance[2])
        uploads.append(constructor)
        header["instance"] = [instance[0], instance[1], constructor.digest]
    state = CallState(
        options.get("name") or name or _name_of(target),
        Outgoing(header["key"], header, payload.inline, tuple(uploads)),
        durable=not settings.config.is_load_balanced,
        detached=bool(options.get("detach")),
        stream=stream,
        echo=True,
    )
    line.start(state)
    return state


class _Described:
    """A target's content, as long as its code does not change."""

    def __init__(self, code: Code, uploads: tuple[Upload, Upload]) -> None:
        self.code, self.uploads = code, uploads


#: By target, settings and whether the call streams; the oldest go (functions made in a loop must not stay for ever).
_described: OrderedDict[tuple[int, int, bool], tuple[Any, _Described]] = OrderedDict()
_DESCRIBED_MOST = 1000
_modules: list[tuple[Any, Upload]] = []


def _describe(line: Connection, target: Callable[..., Any], settings: Settings, stream: bool, instance: bool) -> tuple[Code, Upload, Upload]:
    """(code, its upload, the spec's upload); built again only when the code was."""
    from remoted_client.codec import UnpicklableError, function_identity

    try:
        code = line.encoder.encode_call_target(target)
    except UnpicklableError as error:
        raise SerializationError(str(error), getattr(error, "path", "")) from error
    key = (id(target), id(settings), stream)
    known = _described.get(key)
    if known is None or known[0] is not target or known[1].code.payload is not code.payload:
        document = settings.spec(function_identity(target), stream, instance)
        spec = json.dumps(document, sort_keys=True).encode()
        uploads = (Upload(hashlib.sha256(code.payload).hexdigest(), "code", code.payload), Upload(hashlib.sha256(spec).hexdigest(), "spec", spec))
        known = _described[key] = (target, _Described(code, uploads))
        if len(_described) > _DESCRIBED_MOST:
            _described.popitem(last=False)
    return code, *known[1].uploads


def _modules_upload(code: Code) -> Upload | None:
    if not code.modules:
        return None
    if not _modules or _modules[0][0] is not code.modules:
        data = code.modules.to_bytes()
        _modules[:] = [(code.modules, Upload(hashlib.sha256(data).hexdigest(), "modules", data))]
    return _modules[0][1]


def encode_arguments(line: Connection, args: tuple[Any, ...], kwargs: dict[str, Any], code: Code | None) -> Payload:
    """Raises SerializationError naming argument and attribute."""
    from remoted_client.codec import UnpicklableError

    writer = PayloadWriter()
    try:
        line.encoder.encode_arguments_into(writer, args, kwargs, code)  # type: ignore[arg-type]
    except BaseException as error:
        writer.abandon()
        if isinstance(error, UnpicklableError):
            raise SerializationError(str(error), getattr(error, "path", "")) from error
        raise
    return writer.finish()


def _constructor_upload(payload: Payload) -> Upload:
    if payload.digest:
        return Upload(payload.digest, "constructor", payload)
    return Upload(hashlib.sha256(payload.inline).hexdigest(), "constructor", payload.inline)


def _name_of(target: Callable[..., Any]) -> str:
    return getattr(target, "__qualname__", type(target).__qualname__)


class RemoteFunction(Generic[P, H]):
    """A function that runs in a worker. Calling it starts a call; ``H`` is the handle it gives.

    Example:
        >>> @remote(resource_config=CpuLiveServerless(name="demo"))
        ... def square(x: int) -> int: return x * x
        >>> square(3).result().output
        9
    """

    def __init__(self, function: Callable[P, Any], settings: Settings, options: dict[str, Any] | None = None) -> None:
        self._function = function
        self._settings = settings
        self._options = dict(options or {})
        self._stream = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        self._signature: inspect.Signature | None = None
        functools.update_wrapper(self, function)

    @property
    def __remote_config__(self) -> dict[str, Any]:
        """What the decorator was told, under the SDK's names."""
        settings = self._settings
        return {
            "resource_config": settings.config,
            "method": settings.method,
            "path": settings.path,
            "dependencies": list(settings.dependencies) or None,
            "system_dependencies": list(settings.system_dependencies) or None,
        }

    def __repr__(self) -> str:
        return f"<remote function {_name_of(self._function)} on {self._settings.config.name}>"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """A decorated method: the instance is sent along as the first argument."""
        call: Any = self
        return self if instance is None else functools.partial(call, instance)

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (self._function, _without_values(self._settings), self._options)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> H:
        """Start a call. Raises TypeError for arguments that do not fit, SerializationError for what cannot be sent."""
        self._check_arguments(args, kwargs)
        if self._settings.runs_here:
            return self.local(*args, **kwargs)
        state = submit(connection.current(), self._function, self._settings, self._options, args, kwargs, stream=self._stream)
        handle: Any = StreamHandle(state) if self._stream else Handle(state)
        result: H = handle
        return result

    def local(self, *args: P.args, **kwargs: P.kwargs) -> H:
        """Run it here, without a daemon; gives the same types."""
        self._check_arguments(args, kwargs)
        durable = not self._settings.config.is_load_balanced
        name = _name_of(self._function)
        handle: Any
        if self._stream:
            handle = LocalStream(name, self._function(*args, **kwargs), durable=durable)
        else:
            handle = LocalHandle(name, lambda: self._function(*args, **kwargs), durable=durable)
        result: H = handle
        return result

    def options(
        self,
        *,
        timeout: float | None = None,
        max_retries: int | None = None,
        detach: bool | None = None,
        name: str | None = None,
        priority: int | None = None,
    ) -> RemoteFunction[P, H]:
        """The same function, with other settings for the calls made through what this returns.

        ``timeout`` in seconds per attempt; ``priority`` -100..100, among your own calls; ``detach=True`` lets the
        call outlive this process.
        """
        changed: dict[str, Any] = {}
        if timeout is not None:
            changed["timeout_seconds"] = check_amount("timeout", timeout)
        if max_retries is not None:
            changed["max_retries"] = check_int("max_retries", max_retries, 0, 1000)
        if detach is not None:
            changed["detach"] = bool(detach)
        if name is not None:
            changed["name"] = str(name)[:200]
        if priority is not None:
            changed["priority"] = check_int("priority", priority, -100, 100)
        return RemoteFunction(self._function, self._settings, {**self._options, **changed})

    def map(self, *iterables: Iterable[Any], return_exceptions: bool = False, progress: bool = False) -> MapResult[Any]:
        """Call it for every element (of several iterables in step); results come in input order.

        Yields what awaiting each handle gives. At most 1,000 calls are on their way, so an endless iterable is
        fine. ``progress=True`` shows a line on stderr.
        """
        return self.starmap(zip(*iterables, strict=False), return_exceptions=return_exceptions, progress=progress)

    def starmap(self, arguments: Iterable[tuple[Any, ...]], *, return_exceptions: bool = False, progress: bool = False) -> MapResult[Any]:
        """As ``map``, each element being the arguments of one call."""
        call: Any = self
        return MapResult(call, arguments, _name_of(self._function), return_exceptions=return_exceptions, progress=progress)

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._signature is None:
            self._signature = inspect.signature(self._function)
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{_name_of(self._function)}() {error}") from None


def rebuild(function: Callable[..., Any], settings: Settings, options: dict[str, Any]) -> RemoteFunction[Any, Any]:
    """What a ``RemoteFunction`` is pickled as."""
    return RemoteFunction(function, settings, options)


def _without_values(settings: Settings) -> Settings:
    """Values of ``env=`` never travel in code: in the worker they are looked up by name (F16)."""
    if not settings.declared:
        return settings
    copy = Settings.__new__(Settings)
    copy.__dict__.update(settings.__dict__)
    copy.env = dict.fromkeys(settings.declared, None)
    copy.config = settings.config.without_env()
    return copy
