"""The three words of bpf(2) that device rules need, through the C library: nothing in Python's own speaks it.

include/uapi/linux/bpf.h; cgroup device programs are there since Linux 4.15.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _PROG_ATTACH = 5, 8
_CGROUP_DEVICE_PROGRAM, _CGROUP_DEVICE = 15, 6
#: Programs of groups above and of systemd's stay in force beside it.
_ALLOW_MULTI = 2
_ATTRIBUTE_BYTES = 128
_INSTRUCTION_BYTES = 8


def load_device_program(instructions: bytes) -> int:
    """A descriptor of the program. Raises OSError, also where the kernel has no such programs."""
    code, license_ = ctypes.create_string_buffer(instructions), ctypes.create_string_buffer(b"GPL")
    count = len(instructions) // _INSTRUCTION_BYTES
    return _bpf(_PROG_LOAD, struct.pack("=IIQQIIQ", _CGROUP_DEVICE_PROGRAM, count, ctypes.addressof(code), ctypes.addressof(license_), 0, 0, 0))


def attach_to_group(folder: Path, program: int) -> None:
    """From now on the program decides who in this group of the unified hierarchy opens what. Raises OSError."""
    group = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _bpf(_PROG_ATTACH, struct.pack("=IIII", group, program, _CGROUP_DEVICE, _ALLOW_MULTI))
    finally:
        os.close(group)


def _bpf(word: int, attribute: bytes) -> int:
    number = _SYS_BPF.get(os.uname().machine)
    if number is None:
        raise OSError(f"cannot call bpf(2) on {os.uname().machine}: its number is not known here")
    buffer = ctypes.create_string_buffer(attribute, _ATTRIBUTE_BYTES)
    result = int(ctypes.CDLL(None, use_errno=True).syscall(number, word, buffer, _ATTRIBUTE_BYTES))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
