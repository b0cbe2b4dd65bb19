"""Which cards a worker may open, as a rule that the kernel keeps: CUDA_VISIBLE_DEVICES is manners, this is not (T47).

One small program for each set of cards, attached to a worker's group (BPF_CGROUP_DEVICE). It is asked for every open of a
device node, and for every mknod. A descriptor that is open already stays usable, so a worker's cards never change.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from remoted import bpf

#: Documentation/admin-guide/devices.txt: the driver's own; 254 and 255 (modeset, ctl) are no cards.
CARDS_MAJOR = 195
_LAST_CARD = 253
# struct bpf_cgroup_dev_ctx: access_type (low half: 1 block, 2 character), major, minor
_ACCESS, _MAJOR, _MINOR = 0, 4, 8
_CHARACTER = 2
# The instructions used (include/uapi/linux/bpf.h): load a word, and, jump if not equal, equal or greater, move, exit.
_LOAD, _AND, _JUMP_NOT_EQUAL, _JUMP_EQUAL, _JUMP_GREATER, _MOVE, _EXIT = 0x61, 0x57, 0x55, 0x15, 0x25, 0xB7, 0x95

#: Stands for the way to the end of the program, where everything is allowed.
_TO_ALLOW = -1


class DeviceRules:
    """Programs by the cards that they allow; made once, kept for the daemon's life."""

    def __init__(self) -> None:
        self._programs: dict[tuple[int, ...], int] = {}

    def program(self, cards: Iterable[int]) -> int:
        """A descriptor, this object's. ``cards``: minor numbers, as in /dev/nvidiaN. Raises OSError."""
        key = tuple(sorted(set(cards)))
        if key not in self._programs:
            self._programs[key] = bpf.load_device_program(instructions(key))
        return self._programs[key]

    def close(self) -> None:
        for program in self._programs.values():
            os.close(program)
        self._programs.clear()


def find_rules(folder: Path) -> DeviceRules | None:
    """Rules, if the kernel keeps such in groups below ``folder``, which is tried; None where it does not."""
    trial = folder / "device-rules"
    rules = DeviceRules()
    try:
        trial.mkdir(exist_ok=True)
        bpf.attach_to_group(trial, rules.program(()))
    except OSError:
        rules.close()
        return None
    finally:
        with contextlib.suppress(OSError):
            trial.rmdir()
    return rules


def instructions(cards: tuple[int, ...]) -> bytes:
    """Everything is allowed but NVIDIA's cards that are not among these."""
    body = [
        (_LOAD, 2, 1, _MAJOR, 0),
        (_JUMP_NOT_EQUAL, 2, 0, _TO_ALLOW, CARDS_MAJOR),
        (_LOAD, 2, 1, _ACCESS, 0),
        (_AND, 2, 0, 0, 0xFFFF),
        (_JUMP_NOT_EQUAL, 2, 0, _TO_ALLOW, _CHARACTER),
        (_LOAD, 2, 1, _MINOR, 0),
        (_JUMP_GREATER, 2, 0, _TO_ALLOW, _LAST_CARD),
        *((_JUMP_EQUAL, 2, 0, _TO_ALLOW, card) for card in cards),
        (_MOVE, 0, 0, 0, 0),
        (_EXIT, 0, 0, 0, 0),
    ]
    allow = len(body)
    code = [_instruction(word, target, source, allow - at - 1 if offset == _TO_ALLOW else offset, value) for at, (word, target, source, offset, value) in enumerate(body)]
    return b"".join([*code, _instruction(_MOVE, 0, 0, 0, 1), _instruction(_EXIT, 0, 0, 0, 0)])


def _instruction(code: int, target: int, source: int, offset: int, value: int) -> bytes:
    """struct bpf_insn; the byte order of the two registers' half bytes is that of a little-endian host."""
    return struct.pack("<BBhi", code, source << 4 | target, offset, value)
