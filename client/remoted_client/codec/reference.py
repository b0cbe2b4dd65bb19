"""What can be found by import on the other side, and so travels as a name."""

from __future__ import annotations

import sys
import types
from importlib.machinery import BuiltinImporter

from cloudpickle import cloudpickle as cp  # type: ignore[import-untyped, unused-ignore]

MAIN_NAMES = ("__main__", "__mp_main__")


def importable(module: types.ModuleType) -> bool:
    """Would ``import`` find this very module in another process of the same user?"""
    name = getattr(module, "__name__", None)
    if name is None or name in MAIN_NAMES or sys.modules.get(name) is not module:
        return False
    if cp._is_registered_pickle_by_value(module):
        return False
    if getattr(module, "__spec__", None) is not None or BuiltinImporter.find_spec(name) is not None:
        return True
    package = name.rpartition(".")[0]  # a package may put modules that it makes into sys.modules (torch.ops)
    return package in sys.modules and importable(sys.modules[package])


def by_reference(value: object) -> bool:
    """Can a function or class be written as module and name?"""
    found = cp._lookup_module_and_qualname(value)
    return found is not None and importable(found[0])


def owner(scope: dict[str, object]) -> types.ModuleType | None:
    """The module that a dict of globals belongs to, if it is in ``sys.modules`` under its own name."""
    name = scope.get("__name__")
    module = sys.modules.get(name) if isinstance(name, str) else None
    return module if module is not None and getattr(module, "__dict__", None) is scope else None
