"""The memory of PyTorch tensors, out of band: their own pickling copies it three times.

A tensor reduces to its storage and how to look at it (``torch._utils._rebuild_tensor_v2``); only the storage is
taken over here, so strides, views, parameters and subclasses stay PyTorch's business. PyTorch is never imported by
this module unless a storage of its own has come by.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from typing import Any


def reduce_storage(value: Any) -> Any:
    """For ``reducer_override``: of a ``torch.storage.TypedStorage`` in host memory, else NotImplemented."""
    kind = type(value)
    if kind.__name__ != "TypedStorage" or kind.__module__ != "torch.storage":
        return NotImplemented
    storage = value._untyped_storage  # the public names of the typed one warn
    if storage.device.type != "cpu" or not storage.nbytes():
        return NotImplemented
    torch: Any = sys.modules["torch"]
    data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return _storage, (pickle.PickleBuffer(data), value.dtype)


def _storage(buffer: Any, dtype: Any) -> Any:
    """On memory that the receiver may write to: what came in band is a bytearray, or copied if it is not."""
    torch: Any = importlib.import_module("torch")
    if memoryview(buffer).readonly:
        buffer = bytearray(buffer)
    return torch.storage.TypedStorage(wrap_storage=torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage(), dtype=dtype, _internal=True)
