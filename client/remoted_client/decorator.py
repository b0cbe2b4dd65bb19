"""``@remote``: checks what it is told when it is told, and wraps a function or a class."""

from __future__ import annotations

import types
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, overload

from remoted_client.config import (
    CpuLiveLoadBalancer,
    CpuLiveServerless,
    CpuLoadBalancerSlsResource,
    CpuServerlessEndpoint,
    LiveLoadBalancer,
    LiveServerless,
    LoadBalancerSlsResource,
    ResourceConfig,
    ServerlessEndpoint,
)
from remoted_client.function import RemoteFunction
from remoted_client.settings import Settings
from remoted_client.suggest import (
    check_amount,
    check_bool,
    check_env,
    check_int,
    check_list,
    check_requirements,
    did_you_mean,
    unknown_field,
    warn,
    wrong_type,
)

if TYPE_CHECKING:
    from remoted_client.handle import Handle, StreamHandle
    from remoted_client.output import JobOutput
    from remoted_client.remote_class import RemoteClass

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")

QueueConfig = LiveServerless | CpuLiveServerless | ServerlessEndpoint | CpuServerlessEndpoint
LoadBalancedConfig = LiveLoadBalancer | CpuLiveLoadBalancer | LoadBalancerSlsResource | CpuLoadBalancerSlsResource

_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")
_KNOWN = ("resource_config", "dependencies", "system_dependencies", "accelerate_downloads", "env", "max_retries", "timeout", "local", "method", "path")
#: Words of the SDK's other versions that mean nothing here.
_IGNORED = frozenset({"sync", "hf_models_to_cache"})


class QueueDecorator(Protocol):
    """What ``remote(queue config)`` gives: the calls' results are ``JobOutput``."""

    @overload
    def __call__(self, target: type[C], /) -> RemoteClass[C]: ...  # type: ignore[overload-overlap]  # a class is a Callable too; the first match is meant
    @overload
    def __call__(self, target: Callable[P, AsyncIterator[R]], /) -> RemoteFunction[P, StreamHandle[JobOutput[list[R]]]]: ...
    @overload
    def __call__(self, target: Callable[P, Iterator[R]], /) -> RemoteFunction[P, StreamHandle[JobOutput[list[R]]]]: ...
    @overload
    def __call__(self, target: Callable[P, Coroutine[Any, Any, R]], /) -> RemoteFunction[P, Handle[JobOutput[R]]]: ...
    @overload
    def __call__(self, target: Callable[P, R], /) -> RemoteFunction[P, Handle[JobOutput[R]]]: ...


class LoadBalancedDecorator(Protocol):
    """What ``remote(load-balanced config)`` gives: the calls' results are the values themselves."""

    @overload
    def __call__(self, target: type[C], /) -> RemoteClass[C]: ...  # type: ignore[overload-overlap]  # a class is a Callable too; the first match is meant
    @overload
    def __call__(self, target: Callable[P, AsyncIterator[R]], /) -> RemoteFunction[P, StreamHandle[list[R]]]: ...
    @overload
    def __call__(self, target: Callable[P, Iterator[R]], /) -> RemoteFunction[P, StreamHandle[list[R]]]: ...
    @overload
    def __call__(self, target: Callable[P, Coroutine[Any, Any, R]], /) -> RemoteFunction[P, Handle[R]]: ...
    @overload
    def __call__(self, target: Callable[P, R], /) -> RemoteFunction[P, Handle[R]]: ...


@overload
def remote(
    resource_config: QueueConfig,
    dependencies: list[str] | None = None,
    system_dependencies: list[str] | None = None,
    accelerate_downloads: bool = False,
    env: dict[str, str] | dict[str, None] | dict[str, str | None] | None = None,
    max_retries: int = 1,
    timeout: float = 3600,
    local: bool = False,
    method: str | None = None,
    path: str | None = None,
) -> QueueDecorator: ...
@overload
def remote(
    resource_config: LoadBalancedConfig,
    dependencies: list[str] | None = None,
    system_dependencies: list[str] | None = None,
    accelerate_downloads: bool = False,
    env: dict[str, str] | dict[str, None] | dict[str, str | None] | None = None,
    max_retries: int = 1,
    timeout: float = 3600,
    local: bool = False,
    method: str | None = None,
    path: str | None = None,
) -> LoadBalancedDecorator: ...
def remote(
    resource_config: ResourceConfig | None = None,
    dependencies: list[str] | None = None,
    system_dependencies: list[str] | None = None,
    accelerate_downloads: bool = False,
    env: Any = None,
    max_retries: int = 1,
    timeout: float = 3600,
    local: bool = False,
    method: str | None = None,
    path: str | None = None,
    **unknown: Any,
) -> Any:
    """Mark a function (or class) for execution in a worker of ``resource_config``.

    Args:
        resource_config: one of the eight config classes; it says what the workers are.
        dependencies: Python requirements, e.g. ``["numpy==2.*"]``; built once as an environment.
        system_dependencies: system packages that must be on the host.
        accelerate_downloads: let the installer download in parallel.
        env: variables of the workers; None as a value means the caller's own value at call time.
        max_retries: further attempts of a queue call after an exception of any kind or a lost worker; 0 for a body that must not run twice.
        timeout: seconds per attempt in which it runs.
        local: run the calls here instead, with the same types.
        method, path: the HTTP route of a load-balanced function.

    Raises:
        TypeError: a wrong type, an unknown keyword (with a suggestion), no config.
        ValueError: a value that is not allowed, by name.

    Example:
        >>> @remote(resource_config=LiveServerless(name="train", gpus=[GpuGroup.AMPERE_24]), dependencies=["torch"])
        ... async def train(data): ...
        >>> job = await train(data)
    """
    for word in unknown:
        if word not in _IGNORED:
            raise unknown_field("remote", word, _KNOWN)
    if not isinstance(resource_config, ResourceConfig):
        hint = "; write @remote(LiveServerless(name=...)), with parentheses" if isinstance(resource_config, types.FunctionType) else ""
        raise TypeError(str(wrong_type("resource_config", resource_config, "one of the resource config classes, e.g. LiveServerless(name=...)")) + hint)
    settings = Settings(
        resource_config,
        dependencies=check_requirements("dependencies", dependencies),
        system_dependencies=_check_strings("system_dependencies", system_dependencies),
        accelerate_downloads=check_bool("accelerate_downloads", accelerate_downloads),
        env=check_env("env", env) if env is not None else None,
        max_retries=check_int("max_retries", max_retries, 0, 1000),
        timeout=check_amount("timeout", timeout),
        local=check_bool("local", local),
        method=method,
        path=path,
    )
    _check_route(settings)
    _tell_idle(settings)
    _tell_other_size(settings.config)
    return _Decorator(settings)


def _tell_small_batches(target: Any, settings: Settings) -> None:
    size, at_once = getattr(target, "max_batch_size", 1), settings.config.max_concurrency
    if hasattr(target, "batch_function") and at_once < size:
        warn(f"@batched(max_batch_size={size}) gets batches of at most {at_once}: give {type(settings.config).__name__}(name={settings.config.name!r}) max_concurrency={size}")


def _check_strings(field: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    items = check_list(field, value, "a list of strings")
    for item in items:
        if not isinstance(item, str) or not item.strip():
            raise wrong_type(f"{field}: each entry", item, "a string such as 'ffmpeg'")
    return tuple(str(item) for item in items)


def _check_route(settings: Settings) -> None:
    if settings.method is None and settings.path is None:
        return
    if not settings.config.is_load_balanced:
        warn("method= and path= have no effect on queue classes; use a load-balanced class")
        return
    if settings.method not in (None, *_METHODS):
        raise ValueError(f"cannot use method={settings.method!r}: allowed are {', '.join(_METHODS)}")
    if settings.path is not None:
        if not settings.path.startswith("/"):
            raise ValueError(f"cannot use path={settings.path!r}: it must begin with /")
        _check_path(settings.path)


def _check_path(path: str) -> None:
    """Parts are texts or ``{parameter}``; a request's path has the same parts."""
    names = [part[1:-1] for part in path.split("/") if part.startswith("{") and part.endswith("}")]
    texts = [part for part in path.split("/")[1:] if not (part.startswith("{") and part.endswith("}"))]
    if any(not name.isidentifier() for name in names) or len(set(names)) != len(names):
        raise ValueError(f"cannot use path={path!r}: each {{parameter}} is one whole part with a name of its own, e.g. /items/{{id}}")
    for text in texts:
        if not text.isprintable() or set(text) & set("{}?#% ") or text in (".", "..") or (not text and path != "/") or len(path) > 200:
            raise ValueError(f"cannot use path={path!r}: {text!r} cannot be a part of it; write letters, digits, - _ . or {{parameter}}, e.g. /items/{{id}}")


def _check_parameters(target: Any, settings: Settings) -> None:
    """What the path names must be parameters of the function."""
    code = getattr(target, "__code__", None)
    known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code is not None else ()
    for part in (settings.path or "").split("/"):
        if part.startswith("{") and code is not None and part[1:-1] not in known and not code.co_flags & 0x08:  # **kwargs
            raise ValueError(f"cannot use path={settings.path!r}: {getattr(target, '__name__', target)}() has no parameter {part[1:-1]!r}{did_you_mean(part[1:-1], list(known))}")


def _tell_idle(settings: Settings) -> None:
    """What is accepted and does nothing is said, once where it stands."""
    config = settings.config
    if settings.system_dependencies:
        names = ", ".join(settings.system_dependencies)
        warn(f"system_dependencies= has no effect yet: {names} must be on this host (ask its administrator, or install it yourself)")
    if settings.max_retries > 1 and config.is_load_balanced:
        warn(f"max_retries= has no effect on {type(config).__name__}: a direct call is never run twice; catch the exception and call again, or use a queue class")
    if config.preemptible:
        warn("preemptible= has no effect yet")
    if config.gpu_memory_gb is not None:
        warn("gpu_memory_gb= has no effect yet: a worker has its GPUs to itself")


#: The configs of this script that are in use, by class and name.
_configs: weakref.WeakValueDictionary[tuple[str, str], ResourceConfig] = weakref.WeakValueDictionary()


def _tell_other_size(config: ResourceConfig) -> None:
    """Configs of one class and name share one pool, which has one size."""
    key = (type(config).__name__, config.name)
    other = _configs.get(key)
    if other is not None and other.workersMax != config.workersMax:
        warn(
            f"two configs {key[0]}(name={config.name!r}) say workersMax={other.workersMax} and workersMax={config.workersMax}: "
            "they share one pool, whose size is what the latest call says; give them different names, or one size"
        )
    _configs[key] = config


class _Decorator(Generic[R]):
    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __call__(self, target: Any) -> Any:
        if isinstance(target, type):
            from remoted_client.remote_class import RemoteClass

            if self._settings.method or self._settings.path:
                raise TypeError(f"cannot give {target.__qualname__} an HTTP route: method= and path= are for functions")
            return RemoteClass(target, self._settings)
        if isinstance(target, RemoteFunction):
            raise TypeError(f"cannot decorate {target!r} again: it is remote already")
        if isinstance(target, (staticmethod, classmethod)) or not callable(target):
            raise TypeError(f"cannot decorate a {type(target).__name__}: @remote takes a function or a class")
        _check_parameters(target, self._settings)
        _tell_small_batches(target, self._settings)
        return RemoteFunction(target, self._settings)


