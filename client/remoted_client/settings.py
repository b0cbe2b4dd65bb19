"""What a decorator was told, and the questions that everybody asks about a function."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remoted_client.config import ResourceConfig

# inspect's CO_GENERATOR and CO_ASYNC_GENERATOR, without the 20 ms that importing it costs.
_GENERATOR_FLAGS = 0x20 | 0x200
#: What ``os.environ`` keeps the environment in: asking itself for a name that is not set raises and catches two exceptions.
_environ = getattr(os.environ, "_data", {b"REMOTED_LOCAL": b""})


def streams(function: object) -> bool:
    """Is it a generator function, plain or async?"""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code is not None and bool(code.co_flags & _GENERATOR_FLAGS)


def is_async(function: Any) -> bool:
    """Does calling it give something that an event loop must run? What lies below all decorators says so."""
    import inspect

    target = inspect.unwrap(function) if callable(function) else function
    target = getattr(target, "__func__", target)
    call = getattr(type(target), "__call__", None)  # noqa: B004 - of an object that is called like a function
    return inspect.iscoroutinefunction(target) or inspect.isasyncgenfunction(target) or inspect.iscoroutinefunction(call)


def blocks(target: Any) -> bool:
    """Does its body hold the main thread of its worker? Of a class each method is what it is, and a batch is one body for many calls."""
    return not isinstance(target, type) and not hasattr(target, "max_batch_size") and not is_async(target)


def name_of(target: Callable[..., Any]) -> str:
    return getattr(target, "__qualname__", type(target).__qualname__)


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
        #: Where values are found that did not travel with the code (``context.values``).
        self.places: dict[str, str] = {}

    @functools.cached_property
    def declared(self) -> dict[str, str | None]:
        """``env=`` of the decorator over the config's over the template's."""
        from remoted_client import context

        return {**self.config.declared_env, **self.env, **{name: context.value_of(place) for name, place in self.places.items()}}

    @functools.cached_property
    def without_values(self) -> Settings:
        """The same for code that travels: the daemon keeps code, so values go with each call's surroundings (F16)."""
        if not self.declared:
            return self
        import secrets

        from remoted_client import context

        copy = Settings.__new__(Settings)
        copy.__dict__.update(self.__dict__)
        for computed in ("declared", "without_values"):
            copy.__dict__.pop(computed, None)
        mark = secrets.token_hex(8)
        copy.places = {name: f"{mark}:{name}" for name, value in self.declared.items() if value is not None}
        copy.env = dict.fromkeys(self.declared, None)
        copy.config = self.config.without_env()
        context.values.update({place: self.declared[name] or "" for name, place in copy.places.items()})
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        """Computed parts stay behind: they hold values."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("declared", "without_values")}
        return _restored, (kept,)

    @property
    def runs_here(self) -> bool:
        return self.local or (b"REMOTED_LOCAL" in _environ and os.environ.get("REMOTED_LOCAL", "").strip().lower() not in ("", "0", "false", "no", "off"))

    def spec(self, identity: tuple[str, str, str], imports: tuple[str, ...], stream: bool, is_alone: bool, cwd: str, sys_path: list[str]) -> dict[str, Any]:
        """The document that all calls of one function share."""
        module, qualname, digest = identity
        return {
            "function": {"module": module, "qualname": qualname, "digest": digest, "imports": imports, "blocks": is_alone},
            "pool": self.config.to_wire(),
            "dependencies": self.dependencies,
            "system_dependencies": self.system_dependencies,
            "accelerate_downloads": self.accelerate_downloads,
            "max_retries": 0 if self.config.is_load_balanced else self.max_retries,
            "timeout_seconds": self.timeout,
            "python": sys.version_info[:3],
            "executable": _own_python(),
            "stream": stream,
            "cwd": cwd,
            "sys_path": sys_path,
            "declared": sorted(self.declared),
        }


def _restored(state: dict[str, Any]) -> Settings:
    settings = Settings.__new__(Settings)
    settings.__dict__.update(state)
    return settings


def _own_python() -> str:
    """The interpreter that the user runs. In a worker of ``dependencies=`` the one at work is built over it, and changes."""
    from remoted_client import context

    return (context.in_worker and os.environ.get("REMOTED_PYTHON")) or sys.executable
