"""A large copy of memory, by several threads: one core alone does not use half of what the memory can do (docs/decisions/0102)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading

#: Least for a thread of its own: to start one takes as long as copying a twentieth of this.
_SHARE_BYTES = 8 << 20
_THREADS_MOST = 4


#: Our own: others say what arguments the functions of ``ctypes.pythonapi`` take.
_python = ctypes.PyDLL(None)


class _Buffer(ctypes.Structure):
    """``Py_buffer`` (Include/cpython/pybuffer.h, part of the stable ABI since Python 3.11 and the same before)."""

    _fields_ = (
        ("buf", ctypes.c_void_p), ("obj", ctypes.c_void_p), ("len", ctypes.c_ssize_t), ("itemsize", ctypes.c_ssize_t), ("readonly", ctypes.c_int), ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("suboffsets", ctypes.c_void_p), ("internal", ctypes.c_void_p),
    )  # fmt: skip


def copy(target: memoryview, source: memoryview, cores: int | None = None) -> None:
    """Both of the same size, and bytes without gaps. ``cores``: as many as this process may use, if nothing else is said.

    If a signal's handler raises meanwhile, ``target`` may be written into for some time after that.
    """
    shares = min(_THREADS_MOST, cores or len(os.sched_getaffinity(0)), target.nbytes // _SHARE_BYTES)
    if shares < 2:
        target[:] = source
    else:
        _copy_in_shares(target, source, shares)


def _copy_in_shares(target: memoryview, source: memoryview, shares: int) -> None:
    size = -(-target.nbytes // shares)
    others = [_Share(target[start : start + size], source[start : start + size]) for start in range(size, target.nbytes, size)]
    _move(target[:size], source[:size])
    for other in others:
        other.finish()


class _Share(threading.Thread):
    """A part of it. It holds on to the memory until it is done, whatever becomes of the others."""

    def __init__(self, target: memoryview, source: memoryview) -> None:
        super().__init__(name="remoted-copy", daemon=True)
        self._target, self._source = target, source
        self._is_over = False
        with contextlib.suppress(RuntimeError):  # this process may have no more threads
            self.start()

    def run(self) -> None:
        with contextlib.suppress(MemoryError):  # tried again by who waits for it
            _move(self._target, self._source)
            self._is_over = True

    def finish(self) -> None:
        if self.ident is not None:
            self.join()
        if not self._is_over:
            _move(self._target, self._source)


def _move(target: memoryview, source: memoryview) -> None:
    """Without the interpreter's lock, which an assignment of slices holds."""
    into, out_of = _Buffer(), _Buffer()
    _python.PyObject_GetBuffer(ctypes.py_object(target), ctypes.byref(into), 1)  # PyBUF_WRITABLE
    try:
        _python.PyObject_GetBuffer(ctypes.py_object(source), ctypes.byref(out_of), 0)  # PyBUF_SIMPLE
        try:
            ctypes.memmove(into.buf, out_of.buf, target.nbytes)
        finally:
            _python.PyBuffer_Release(ctypes.byref(out_of))
    finally:
        _python.PyBuffer_Release(ctypes.byref(into))
