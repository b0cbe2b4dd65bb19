"""Which large packages calling a function will import: a guess, for a fork server that imports them beforehand.

Only packages that are known to stand a fork, and whose variables the daemon knows (``remoted/spec.py``): what they read
at import must be what they would read in the worker. Never a module of the project, whose text may change.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec

from .modules import is_installed

#: Tried: one thread after a fork for trial, no process, no device, the same results as in a new interpreter.
PACKAGES = frozenset(("numpy", "scipy", "sklearn", "torch"))
#: These import their parts only when they are asked for; the others are loaded whole.
_IN_PARTS = frozenset(("scipy", "sklearn"))
_MOST = 16


def expected_imports(root: object) -> tuple[str, ...]:
    """Names of modules, sorted. What stands at the top of the function's file counts, and what its code imports."""
    try:
        names = {_told(name) for name in _names_below(root) if name.partition(".")[0] in PACKAGES}
    except Exception:  # a global of the script's that fails when it is looked at: a guess may not fail the call
        return ()
    return tuple(sorted(name for name in names if not _is_shadowed(name.partition(".")[0])))[:_MOST]


def _names_below(root: object) -> Iterator[str]:
    from .walk import functions_of, reachable

    for value in (root, *(scope[name] for scope, name in reachable(root))):
        yield from _modules_of(value)
        for function in functions_of(value):
            yield from _imported(function.__code__)


def _modules_of(value: object) -> Iterator[str]:
    """Where a global comes from; of a module of the project also what that imports."""
    home = _home(value)
    yield home
    module = sys.modules.get(home)
    file = getattr(module, "__file__", None)
    if module is not None and file and home != "__main__" and not is_installed(file):
        yield from map(_home, list(vars(module).values()))


def _home(value: object) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    # Of anything else only the type is asked: an attribute of an instance may be anything.
    named = value if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) else type(value)
    return str(named.__module__)


def _imported(code: types.CodeType) -> Iterator[str]:
    if any(name.partition(".")[0] in PACKAGES for name in code.co_names):  # else it need not be taken apart
        yield from (str(each.argval) for each in dis.get_instructions(code) if each.opname == "IMPORT_NAME")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _imported(constant)


def _told(name: str) -> str:
    """``sklearn.linear_model._logistic`` is the affair of ``sklearn.linear_model``, and any part of torch that of torch."""
    package, *parts = name.split(".")
    return f"{package}.{parts[0]}" if package in _IN_PARTS and parts and not parts[0].startswith("_") else package


def _is_shadowed(package: str) -> bool:
    """Does the script have a file of its own under this name? What is not there at all may be in the worker's environment."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return True
    return spec is not None and spec.origin is not None and not is_installed(spec.origin)
