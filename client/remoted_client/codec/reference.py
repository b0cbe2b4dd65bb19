"""What can be found by import on the other side, and so travels as a name."""

from __future__ import annotations

import sys
import types
from importlib.machinery import BuiltinImporter

from cloudpickle import cloudpickle as cp  # type: ignore[import-untyped, unused-ignore]

MAIN_NAMES = ("__main__", "__mp_main__")


def import_name(module: types.ModuleType) -> str | None:
    """The name under which ``import`` finds it. A C module may call itself otherwise: ``_io`` says "io"."""
    for name in (getattr(module, "__name__", None), getattr(getattr(module, "__spec__", None), "name", None)):
        if isinstance(name, str) and sys.modules.get(name) is module:
            return name
    return None


def importable(module: types.ModuleType) -> bool:
    """Would ``import`` find this very module in another process of the same user?"""
    if getattr(module, "__name__", None) in MAIN_NAMES:
        return False
    name = import_name(module)
    if name is None or cp._is_registered_pickle_by_value(module):
        return False
    if getattr(module, "__spec__", None) is not None or BuiltinImporter.find_spec(name) is not None:
        return True
    package = name.rpartition(".")[0]  # a package may put modules that it makes into sys.modules (torch.ops)
    return package in sys.modules and importable(sys.modules[package])


def by_reference(value: object) -> bool:
    """Can a function or class be written as module and name?"""
    found = cp._lookup_module_and_qualname(value)
    return found is not None and importable(found[0])


def is_made_in_c(cls: type) -> bool:
    """It cannot be put together from its attributes."""
    kinds = (types.WrapperDescriptorType, types.MethodDescriptorType)
    return any(isinstance(each, kinds) and each.__objclass__ is cls for each in vars(cls).values())


def owner(scope: dict[str, object]) -> types.ModuleType | None:
    """The module that a dict of globals belongs to, if ``sys.modules`` has it under its own name."""
    for name in (scope.get("__name__"), getattr(scope.get("__spec__"), "name", None)):
        module = sys.modules.get(name) if isinstance(name, str) else None
        if module is not None and getattr(module, "__dict__", None) is scope:
            return module
    return None
