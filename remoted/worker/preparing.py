"""From what the daemon or a client sent to a callable with its arguments, in its caller's surroundings."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from remoted_client import codec, parcel, plain
from remoted_client.codec.installed import finder
from remoted_client.settings import is_async

from .calls import Run
from .context import CallContext
from .instances import Instances

_MODULES_SECONDS = 0.1
#: What the worker itself puts into the environment of every call.
_OWN_VARIABLES = ("REMOTED_SOCKET", "REMOTED_WORKER_ID", "REMOTED_PYTHON", "CUDA_VISIBLE_DEVICES")


class Bound:
    """A call with its arguments, ready to be made once."""

    __slots__ = ("_args", "_function", "_kwargs", "is_async")

    def __init__(self, function: Any, is_async: bool, args: Any, kwargs: Any) -> None:
        self._function = function
        self.is_async = is_async
        self._args, self._kwargs = args, kwargs

    def __call__(self) -> Any:
        args, kwargs = self._args, self._kwargs
        self._args, self._kwargs = (), {}  # gigabytes of arguments must not outlive the body's own use
        return self._function(*args, **kwargs)


class Preparer:
    """Everything that this worker has been taught: code, modules, surroundings, instances."""

    def __init__(self, decoder: codec.Decoder) -> None:
        self.instances = Instances()
        self._decoder = decoder
        self._contents: dict[str, bytes | int] = {}
        self._contexts: dict[str, CallContext] = {}
        self._modules: tuple[str, codec.ModuleSet] | None = None
        #: The code that was bound last (of a method its function), and whether it is asynchronous.
        self._asked: object = ""
        self._is_async = False
        self._base_path = list(sys.path)
        self._own = {name: os.environ[name] for name in _OWN_VARIABLES if name in os.environ}

    def learn(self, digest: str, content: bytes | int) -> None:
        """Content that calls will refer to; a descriptor is this object's from here on. Any thread."""
        self._contents[digest] = content

    def prepare(self, run: Run, others_run: bool) -> Bound:
        """Raises what the code or the arguments raise, and ``StaleModules``.

        The surroundings stay, unless other bodies are at work: those get theirs back.
        """
        context = self._contexts.get(run.context) or self._read_context(run.context)
        if run.inline or others_run:
            with context.applied(self._own, self._base_path):
                self._install_modules(run)
                return self._bind(run)
        context.apply(self._own, self._base_path)
        self._install_modules(run)
        return self._bind(run)

    def _read_context(self, digest: str) -> CallContext:
        found = self._contexts[digest] = CallContext(json.loads(self._content(digest)))
        return found

    def _install_modules(self, run: Run) -> None:
        """At every call: a module that a body imported from disk may have been edited since (it is then stale)."""
        if self._modules is None or self._modules[0] != run.modules:
            found = codec.ModuleSet.from_bytes(self._content(run.modules)) if run.modules else codec.ModuleSet()
            self._modules = (run.modules, found)
        # A lease is one run of one script: it goes on with what it has imported, like any script.
        finder().install(self._modules[1], _MODULES_SECONDS if run.number > 1 else 0.0)

    def _content(self, digest: str) -> bytes:
        found = self._contents[digest]
        if isinstance(found, int):
            with open(found, "rb") as file:
                found = self._contents[digest] = file.read()
        return found

    def _bind(self, run: Run) -> Bound:
        target: Any = self._decoder.load_target(self._content(run.code), run.code)
        asked: object = run.code
        if run.instance is not None:
            target, run.instance["constructed"] = self.instances.method(run.instance, lambda: self._construct(target, run))
            asked = getattr(target, "__func__", target)
        if self._asked is not asked and self._asked != asked:
            self._asked, self._is_async = asked, is_async(target)
        args, kwargs = self._load_arguments(run)
        return Bound(target, self._is_async, args, kwargs)

    def _construct(self, kind: Any, run: Run) -> Any:
        assert run.instance is not None
        args, kwargs = self._decoder.load_arguments(self._content(run.instance["constructor"]))
        return kind(*args, **kwargs)

    def _load_arguments(self, run: Run) -> Any:
        if run.is_plain and isinstance(run.arguments, bytes):
            return plain.loads(run.arguments)
        if run.problem is not None:
            raise run.problem
        source, buffers = run.arguments, run.buffers
        run.buffers = None  # gigabytes of arguments must not outlive the body's own use
        if run.is_raw:
            return (_read(source),), {}
        if isinstance(source, bytes):
            return self._decoder.load_arguments(source, buffers)
        with open(source, "rb") as file:
            if (found := parcel.unpack(source)) is not None:
                return self._decoder.load_arguments(*found)
            file.seek(0)  # the offset is the sender's
            return self._decoder.load_arguments(file, buffers)


def _read(source: bytes | int) -> bytes:
    if isinstance(source, bytes):
        return source
    with open(source, "rb") as file:
        file.seek(0)  # the offset is the sender's
        return file.read()
