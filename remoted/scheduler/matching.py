"""Which devices of this host serve what a user asked for.

The only module that knows the names of the Flash document's GPU groups. Pure: facts in, an order of devices out;
whether a device is free is the scheduler's question. Called at registration (can this host ever serve it?) and at
placement.

A group is a set of card names, the generations those cards belong to, and a memory floor. Two names lie about the
generation (ADA_80_PRO is the H100, which is Hopper; ADA_32_PRO is the RTX 5090, which is Blackwell): these groups
accept both the generation they are named after and the one their cards have.

Older than the group is never a match: a T4 or V100 has 16 GB, but code that asked for Ampere may use bfloat16, TF32 or
kernels built for sm_80 and up, and would fail deep inside the user's library. Such cards serve ANY and their own name.
Newer and big enough is a substitute, ranked last, because a wheel built before the card may hold no kernels for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from remoted.model import Device

ANY = "ANY"

_GIB = 1 << 30

#: NVML reports less than the number on the box: ECC on GDDR takes 1/16, the firmware a little more. The worst are an
#: A10G (22,731 of 24,576 MiB) and a T4 (15,109 of 16,384); the next smaller class of cards is 10 % or more below.
_MEMORY_TOLERANCE = 0.08


class Generation(IntEnum):
    """Order of NVIDIA's architectures, as far as the groups tell them apart."""

    OLDER = 0
    AMPERE = 1
    ADA = 2
    HOPPER = 3
    BLACKWELL = 4
    NEWER = 5


@dataclass(frozen=True, slots=True)
class _Group:
    memory_gib: int
    generations: frozenset[Generation]
    names: tuple[str, ...]


def _group(memory_gib: int, generations: Sequence[Generation], *names: str) -> _Group:
    return _Group(memory_gib, frozenset(generations), tuple(_plain(name) for name in names))


def _plain(name: str) -> str:
    # Drivers before 470 say "GeForce RTX 3090", later ones "NVIDIA GeForce RTX 3090": the same card.
    return " ".join(name.casefold().split()).removeprefix("nvidia ")


_GROUPS: dict[str, _Group] = {
    "AMPERE_16": _group(
        16,
        [Generation.AMPERE],
        "NVIDIA RTX A4000",
        "NVIDIA RTX A4500",
        "NVIDIA RTX 4000 Ada Generation",
        "NVIDIA RTX 2000 Ada Generation",
    ),
    "AMPERE_24": _group(24, [Generation.AMPERE], "NVIDIA RTX A5000", "NVIDIA L4", "NVIDIA GeForce RTX 3090"),
    "AMPERE_48": _group(48, [Generation.AMPERE], "NVIDIA A40", "NVIDIA RTX A6000"),
    "AMPERE_80": _group(80, [Generation.AMPERE], "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"),
    "ADA_24": _group(24, [Generation.ADA], "NVIDIA GeForce RTX 4090"),
    "ADA_32_PRO": _group(32, [Generation.ADA, Generation.BLACKWELL], "NVIDIA GeForce RTX 5090"),
    "ADA_48_PRO": _group(48, [Generation.ADA], "NVIDIA RTX 6000 Ada Generation", "NVIDIA L40", "NVIDIA L40S"),
    "ADA_80_PRO": _group(
        80,
        [Generation.ADA, Generation.HOPPER],
        "NVIDIA H100 PCIe",
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 NVL",
    ),
    "HOPPER_141": _group(141, [Generation.HOPPER], "NVIDIA H200", "NVIDIA H200 NVL"),
    "BLACKWELL_96": _group(
        96,
        [Generation.BLACKWELL],
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    ),
    "BLACKWELL_180": _group(180, [Generation.BLACKWELL], "NVIDIA B200"),
}

#: Every group a client may name. Any other string is taken as the exact name of a device.
KNOWN_GROUPS: frozenset[str] = frozenset(_GROUPS) | {ANY}


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """What a function asked for: ``count`` devices, all of one of the ``alternatives``, the first preferred."""

    alternatives: tuple[str, ...]
    count: int


def parse_request(entries: Sequence[str], gpu_count: int | None) -> GpuRequest:
    """Read a ``gpus=[...]`` list: different entries are alternatives, a repeated one is a count, ``gpu_count`` wins.

    No entries mean ANY. Raises ValueError when ``gpu_count`` is below 1 or an entry is empty.
    """
    if gpu_count is not None and gpu_count < 1:
        raise ValueError(f"cannot request {gpu_count} GPUs: ask for at least 1, or leave gpus out for a CPU function")
    multiplicity = Counter(_canonical(entry) for entry in entries or (ANY,))
    return GpuRequest(tuple(multiplicity), gpu_count or max(multiplicity.values()))


def _canonical(entry: str) -> str:
    name = " ".join(entry.split())
    if not name:
        raise ValueError("cannot request a GPU without a name: use a GpuGroup, a GpuType or the name nvidia-smi shows")
    # GpuGroup.ANY has the value "any", the other members are upper case.
    return name.upper() if name.upper() in KNOWN_GROUPS else name


def serves(group: str, device: Device) -> int | None:
    """Rank how well ``device`` serves ``group`` (a known group or an exact device name); None when it does not.

    0: named by the group. 1: of the group's generation, with its memory or more. 2: a newer substitute with the memory.
    For ANY, 0 is a card that some named group would take and 2 any other, so that the small card which drives the
    monitor comes last.
    """
    if group == ANY:
        return 0 if any(_serves_group(known, device) is not None for known in _GROUPS.values()) else 2
    known = _GROUPS.get(group)
    if known is None:
        return 0 if _plain(group) == _plain(device.name) else None
    return _serves_group(known, device)


def _serves_group(group: _Group, device: Device) -> int | None:
    if _plain(device.name) in group.names:
        return 0
    generation = _generation(device.compute_capability)
    if generation < min(group.generations) or device.memory_bytes < _floor_bytes(group):
        return None
    return 1 if generation in group.generations else 2


def _floor_bytes(group: _Group) -> float:
    return group.memory_gib * _GIB * (1 - _MEMORY_TOLERANCE)


def _generation(compute_capability: tuple[int, int] | None) -> Generation:
    # Not stated is treated as too old: the card is still reachable by its name and by ANY.
    if compute_capability is None or compute_capability < (8, 0):
        return Generation.OLDER
    if compute_capability < (9, 0):
        return Generation.ADA if compute_capability == (8, 9) else Generation.AMPERE
    if compute_capability < (10, 0):
        return Generation.HOPPER
    return Generation.BLACKWELL if compute_capability < (13, 0) else Generation.NEWER


def candidates(request: GpuRequest, devices: Iterable[Device]) -> list[tuple[Device, ...]]:
    """Return, for each alternative of ``request`` in its order, the devices that serve it, the best first.

    One tuple per alternative, possibly empty or shorter than ``request.count``: a job's devices come from one tuple.
    Among equals the smallest memory comes first, so that the big cards stay free for those who need them.
    """
    usable = [device for device in devices if request.count == 1 or not _is_slice(device)]
    return [_best_first(alternative, usable) for alternative in request.alternatives]


def _is_slice(device: Device) -> bool:
    # CUDA shows a process one MIG slice at most (MIG user guide), so two slices never serve one worker.
    return device.uuid.startswith("MIG-")


def _best_first(alternative: str, devices: Sequence[Device]) -> tuple[Device, ...]:
    ranked = [(rank, device) for device in devices if (rank := serves(alternative, device)) is not None]
    ranked.sort(key=lambda pair: (pair[0], pair[1].memory_bytes, pair[1].index, pair[1].uuid))
    return tuple(device for _, device in ranked)


def explain_impossible(request: GpuRequest, devices: Iterable[Device]) -> str | None:
    """Say in one sentence why this host can never serve ``request``; None when it can (now or after waiting).

    Example: ``cannot serve 1 x AMPERE_80: this host has 1 x NVIDIA GeForce RTX 3090 (24 GiB); ask for ...``
    """
    host = tuple(devices)
    most = max((len(tier) for tier in candidates(request, host)), default=0)
    if most >= request.count:
        return None
    asked = " or ".join(request.alternatives)
    return f"cannot serve {request.count} x {asked}: this host has {_inventory(host)}{_advice(request, host, most)}"


def _inventory(devices: Sequence[Device]) -> str:
    kinds = Counter(f"{device.name} ({round(device.memory_bytes / _GIB)} GiB)" for device in devices)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "no NVIDIA GPU"


def _advice(request: GpuRequest, host: Sequence[Device], most: int) -> str:
    if most:
        return f"; ask for at most {most}"
    if request.count > 1 and any(_is_slice(device) for device in host):
        return "; a function can use one MIG slice at most"
    if not host:
        return ""
    at_most = f", at most {len(host)}" if request.count > len(host) else ""
    return f"; ask for GpuGroup.ANY or for a card by the name above{at_most}"


def explain_old_driver(cuda_min: str | None, supported: tuple[int, int] | None) -> str | None:
    """Say in one sentence why a driver that runs CUDA up to ``supported`` cannot serve what needs ``cuda_min``.

    None when it can, when nothing is asked for, and when the driver does not say what it supports.
    """
    if cuda_min is None:
        return None
    needed = _version(cuda_min)
    if needed is None:
        return f"cannot read minCudaVersion {cuda_min[:20]!r}: write major.minor, such as 12.4"
    if supported is None or needed <= supported:
        return None
    return (
        f"cannot serve the function: it needs CUDA {_dotted(needed)}, this driver supports {_dotted(supported)}; "
        "upgrade the driver or lower minCudaVersion"
    )


def _version(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"([0-9]{1,4})\.([0-9]{1,4})", text)
    return (int(match[1]), int(match[2])) if match else None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
