"""Devices as facts of the host, read from the driver through NVML; nothing is decided and nothing is set here.

The only module that imports pynvml, and only once the driver's library is found: a host without a GPU does not pay
for it. Every NVML call runs in one helper thread, because a sick driver can block a call for ever in D state
(NVIDIA/open-gpu-kernel-modules #1333). Such a call costs its caller the deadline, later callers nothing, and the
daemon one thread, however often it asks.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from types import ModuleType
from typing import Any, TypeVar

from remoted.model import Device, DeviceProcess, DeviceUse, DeviceUuid

_Answer = TypeVar("_Answer")

_LIBRARY = "libnvidia-ml.so.1"

#: Inode of the first pid namespace (PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h).
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"

#: PID_MAX_LIMIT of a 64-bit kernel (include/linux/threads.h): what is above is not a pid.
_PID_MAX = 1 << 22


class NvmlError(Exception):
    """NVML cannot be used: it hangs, it does not fit the driver, or it is not installed whole. Not: there is no GPU."""


class Nvml:
    """Asks the driver, from an event loop, with a deadline on every question.

    ``library`` is a libnvidia-ml.so.1 to use in place of the system's. ``sees_host_pids`` says whether this process can
    see every process that NVML may report; None asks the kernel.

        nvml = Nvml()
        for device in await nvml.devices():
            ...
    """

    def __init__(
        self,
        library: str | None = None,
        deadline_seconds: float = 5.0,
        *,
        sees_host_pids: bool | None = None,
    ) -> None:
        self._deadline_seconds = deadline_seconds
        self._driver = _Driver(library, _sees_host_pids() if sees_host_pids is None else sees_host_pids)
        self._helper = _Helper()
        self._overdue: Future[Any] | None = None

    @property
    def suspect(self) -> bool:
        """True while a call that missed its deadline has still not returned: lend nothing, the driver may be hung."""
        return self._overdue is not None and not self._overdue.done()

    @property
    def lost(self) -> tuple[str, ...]:
        """Name the devices that the last ``devices`` or ``uses`` left out because they failed, each with its reason."""
        return self._driver.lost

    async def devices(self) -> tuple[Device, ...]:
        """List the devices that can be lent: cards, or the MIG slices of a card in MIG mode. Empty without a driver."""
        return await self._ask(self._driver.devices)

    async def uses(self) -> tuple[DeviceUse, ...]:
        """Say what happens on each device now, in the order of ``devices``."""
        return await self._ask(self._driver.uses)

    async def driver_cuda_version(self) -> tuple[int, int] | None:
        """Return the newest CUDA that the driver can run, e.g. (13, 0); None without a driver, or where it does not say."""
        return await self._ask(self._driver.cuda_version)

    async def driver_version(self) -> str | None:
        """Return the driver's version, e.g. "580.95.05"; None without a driver."""
        return await self._ask(self._driver.version)

    def close(self) -> None:
        """Shut NVML down and end the helper thread; a hung call is left behind in it."""
        self._helper.close(self._driver.close, 0 if self.suspect else self._deadline_seconds)

    async def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        if self.suspect:
            raise self._no_answer()
        future = self._helper.submit(question)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._deadline_seconds)
        except asyncio.TimeoutError:
            # Not always this question: it may have waited behind the one that hangs.
            self._overdue = self._helper.current
            raise self._no_answer() from None

    def _no_answer(self) -> NvmlError:
        return NvmlError(
            f"NVML did not answer within {self._deadline_seconds:g} s: the GPU driver may be hung; "
            "no GPU is lent until it answers. See `dmesg` for Xid errors, reload the driver or reboot"
        )


class _Helper:
    """One daemon thread that answers questions in order; never a second one, however slow the first is."""

    def __init__(self) -> None:
        #: The question being answered; written by the thread only.
        self.current: Future[Any] | None = None
        self._questions: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, question: Callable[[], _Answer]) -> Future[_Answer]:
        if self._closed:
            raise NvmlError("cannot ask NVML: it was closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
            self._thread.start()
        future: Future[_Answer] = Future()
        self._questions.put((question, future))
        return future

    def close(self, last: Callable[[], None], patience_seconds: float) -> None:
        if self._closed or self._thread is None:
            self._closed = True
            return
        self._closed = True
        self._questions.put((last, Future()))
        self._questions.put(None)
        self._thread.join(patience_seconds)

    def _run(self) -> None:
        while (item := self._questions.get()) is not None:
            self._answer(*item)

    def _answer(self, question: Callable[[], Any], future: Future[Any]) -> None:
        self.current = future
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(question())
            except BaseException as error:  # the thread must survive, and the asker must hear of it
                future.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Unit:
    """A device that can be lent: a card, or a MIG slice and the card it is cut from."""

    index: int
    handle: Any
    card: Any

    @property
    def is_slice(self) -> bool:
        return self.handle is not self.card


class _Driver:
    """The blocking half: talks to pynvml, and lives in the helper thread but for its constructor and ``lost``."""

    def __init__(self, library: str | None, sees_host_pids: bool) -> None:
        self.lost: tuple[str, ...] = ()
        self._library = library
        self._sees_host_pids = sees_host_pids
        self._nvml: ModuleType | None = None
        #: What a card was called while it still answered, by NVML index.
        self._labels: dict[int, str] = {}

    def devices(self) -> tuple[Device, ...]:
        return self._session(lambda nvml: self._each_unit(nvml, self._device), ())

    def uses(self) -> tuple[DeviceUse, ...]:
        return self._session(lambda nvml: self._each_unit(nvml, self._use), ())

    def version(self) -> str | None:
        return self._session(lambda nvml: str(nvml.nvmlSystemGetDriverVersion()), None)

    def cuda_version(self) -> tuple[int, int] | None:
        number = self._session(lambda nvml: _optional(nvml, lambda _: int(nvml.nvmlSystemGetCudaDriverVersion_v2()), None), None)
        return None if number is None else (number // 1000, number % 1000 // 10)

    def close(self) -> None:
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def _session(self, question: Callable[[Any], _Answer], without_driver: _Answer) -> _Answer:
        if self._nvml is None and not _is_installed(self._library):
            return without_driver
        nvml = self._nvml or _import_pynvml()
        try:
            if self._nvml is None:
                nvml.nvmlInit()
                self._nvml = nvml
            return question(nvml)
        except nvml.NVMLError as error:
            self.close()  # start afresh next time: the driver may have been reloaded by then
            if error.value in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
                return without_driver
            raise _explain(nvml, error) from error

    def _each_unit(self, nvml: Any, read: Callable[[Any, _Unit], _Answer]) -> tuple[_Answer, ...]:
        found: list[_Answer] = []
        lost: list[str] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                found += [read(nvml, unit) for unit in self._units(nvml, index)]
            except nvml.NVMLError as error:
                if error.value in _host_errors(nvml):
                    raise
                lost.append(f"{self._labels.get(index, f'GPU {index}')}: {error}")
        self.lost = tuple(lost)
        return tuple(found)

    def _units(self, nvml: Any, index: int) -> list[_Unit]:
        card = nvml.nvmlDeviceGetHandleByIndex(index)
        self._labels[index] = f"GPU {index} ({nvml.nvmlDeviceGetName(card)}, {nvml.nvmlDeviceGetUUID(card)})"
        if not _is_sliced(nvml, card):
            return [_Unit(index, card, card)]
        return [_Unit(index, handle, card) for handle in _slices(nvml, card)]

    def _device(self, nvml: Any, unit: _Unit) -> Device:
        return Device(
            uuid=DeviceUuid(nvml.nvmlDeviceGetUUID(unit.handle)),
            index=unit.index,
            minor=_optional(nvml, nvml.nvmlDeviceGetMinorNumber, unit.card),
            name=nvml.nvmlDeviceGetName(unit.handle),
            memory_bytes=_memory(nvml, unit.handle)[0],
            compute_capability=_optional(nvml, nvml.nvmlDeviceGetCudaComputeCapability, unit.card),
        )

    def _use(self, nvml: Any, unit: _Unit) -> DeviceUse:
        total_bytes, used_bytes = _memory(nvml, unit.handle)
        rates = _optional(nvml, nvml.nvmlDeviceGetUtilizationRates, unit.handle)
        return DeviceUse(
            uuid=DeviceUuid(nvml.nvmlDeviceGetUUID(unit.handle)),
            memory_used_bytes=used_bytes,
            utilization_percent=None if rates is None else int(rates.gpu),
            processes=tuple(self._believed(_processes(nvml, unit), total_bytes)),
        )

    def _believed(self, processes: list[DeviceProcess], total_bytes: int) -> Iterator[DeviceProcess]:
        """Keep what can be true: a library that does not fit the driver returns garbage, not an error (NVML 535).

        A pid that no longer exists has just exited and is dropped, but only where we would see it: from another pid
        namespace it may be anybody. A number that cannot be a pid is kept: something holds the device, so it is taken.
        """
        for process in processes:
            is_pid = 0 < process.pid <= _PID_MAX
            if is_pid and self._sees_host_pids and not _exists(process.pid):
                continue
            believable = is_pid and process.used_bytes is not None and process.used_bytes <= total_bytes
            yield process if believable else replace(process, used_bytes=None)


def _is_installed(library: str | None) -> bool:
    # Loading it here is also what makes pynvml use it: the dynamic linker knows a loaded library by its soname.
    try:
        ctypes.CDLL(library or _LIBRARY)
    except OSError as error:
        if library is None and "No such file" in str(error):
            return False
        raise NvmlError(f"cannot load NVML: {error}; reinstall the driver or correct the configured path") from error
    return True


def _import_pynvml() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise NvmlError("cannot ask NVML: pynvml is missing; install the daemon with `remoted[daemon]`") from error
    return pynvml


def _explain(nvml: Any, error: Any) -> NvmlError:
    if error.value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return NvmlError(
            "cannot ask NVML: the driver was upgraded and the running kernel module is still the old one; "
            "reload the driver or reboot, then restart remoted"
        )
    return NvmlError(f"cannot ask NVML: {error}; run `nvidia-smi` to see whether the driver works")


def _host_errors(nvml: Any) -> tuple[int, ...]:
    """Errors that are the driver's, not one card's."""
    return (
        nvml.NVML_ERROR_UNINITIALIZED,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED,
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    )


def _optional(nvml: Any, read: Callable[[Any], _Answer], subject: Any) -> _Answer | None:
    """Return what the driver says, or None where it cannot say it of this kind of device."""
    try:
        return read(subject)
    except nvml.NVMLError as error:
        if error.value not in _unknown_errors(nvml):
            raise
        return None


def _unknown_errors(nvml: Any) -> tuple[int, ...]:
    return (
        nvml.NVML_ERROR_NOT_SUPPORTED,
        nvml.NVML_ERROR_NOT_FOUND,
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    )


def _is_sliced(nvml: Any, card: Any) -> bool:
    mode = _optional(nvml, nvml.nvmlDeviceGetMigMode, card)
    return mode is not None and mode[0] == nvml.NVML_DEVICE_MIG_ENABLE


def _slices(nvml: Any, card: Any) -> list[Any]:
    # The places are fixed by the layout, so there are holes between the slices.
    places = _optional(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, card) or 0
    slice_at = partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, card)
    found = (_optional(nvml, slice_at, place) for place in range(places))
    return [handle for handle in found if handle is not None]


def _memory(nvml: Any, handle: Any) -> tuple[int, int | None]:
    """Return (total, used) in bytes. Version 2 does not count the driver's own reserve as used; old drivers lack it."""
    info = _optional(nvml, partial(nvml.nvmlDeviceGetMemoryInfo, version=nvml.nvmlMemory_v2), handle)
    info = info or _optional(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    if info is None:  # unified memory (GB10, Jetson): the device uses the host's
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    return int(info.total), int(info.used) if info.used <= info.total else None


def _processes(nvml: Any, unit: _Unit) -> list[DeviceProcess]:
    """Merge the two lists; bytes are None where hidden. Who computes and draws stands in both with one sum.

    The compute list is read last: who begins to compute meanwhile is not taken for one that only draws. Where that list
    cannot be read, nobody is.
    """
    graphics = _listed(nvml, "Graphics", unit.handle)
    compute = _listed(nvml, "Compute", unit.handle)
    merged: dict[int, int | None] = {}
    for process in (*(graphics or ()), *(compute or ())):
        sizes = (merged.get(process.pid), process.usedGpuMemory)
        merged[process.pid] = max((size for size in sizes if size is not None), default=None)
    computing = merged.keys() if compute is None else {process.pid for process in compute}
    return [DeviceProcess(pid, used_bytes, pid not in computing) for pid, used_bytes in sorted(merged.items())]


def _listed(nvml: Any, kind: str, handle: Any) -> list[Any] | None:
    # Drivers 450 to 510 have only the second version, with the same fields.
    for version in ("v3", "v2"):
        found = _optional(nvml, getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_{version}"), handle)
        if found is not None:
            return list(found)
    return None


def _sees_host_pids() -> bool:
    # NVML reports pids of the first namespace, whatever the reader's own (NVIDIA/nvidia-docker #1483).
    try:
        return os.readlink("/proc/self/ns/pid") == _INITIAL_PID_NAMESPACE
    except OSError:
        return False


def _exists(pid: int) -> bool:
    # Not a look into /proc: mounted with hidepid=2 it hides other users' processes from a daemon that is not root.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """A zombie has given back its memory and its devices; only its number is left, until its parent asks for it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[:1] == [b"Z"]
    except OSError:
        return False
