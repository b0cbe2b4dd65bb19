"""What ``remotectl doctor`` checks of this host by itself; the daemon's own checks are added when it answers."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remoted import config_files, paths
from remoted.cli import transport
from remoted.cli.ending import CliError, NoDaemon
from remoted.limits import size_text

Check = dict[str, Any]
_PACKAGES = ("aiohttp", "pydantic", "pynvml", "psutil", "prometheus_client", "cloudpickle", "click")
_MINIMUM = (3, 10)
_FREE_BYTES = 1 << 30
_DAEMON_SECONDS = 10.0
_PCI_DEVICES = Path("/sys/bus/pci/devices")
#: PCI's words: the vendor, and the first byte of a class.
_NVIDIA, _DISPLAY = 0x10DE, 0x03


def run() -> list[Check]:
    """Every check, the daemon's last."""
    local: list[Callable[[], Check]] = [_python, _packages, _uv, _nvml, _sockets]
    # A daemon that was started with another HOME keeps its state elsewhere than this shell would: it says where.
    daemon = _daemon()
    is_everybodys = transport.socket_directory() == transport.SYSTEM_DIRECTORY
    if daemon[0]["name"] == "daemon":
        local += [_configuration] if is_everybodys else [_state, _disk, _configuration]
    elif is_everybodys and all(check["name"] != "configuration" for check in daemon):  # it tells administrators only
        local.append(_configuration)
    return [*(check() for check in local), *daemon]


def _check(name: str, ok: bool, detail: str, advice: str = "", warning: bool = False) -> Check:
    """In the shape of the daemon's (``api.schemas.Check``)."""
    return {"name": name, "ok": ok, "detail": detail, "advice": advice, "warning": warning}


def _python() -> Check:
    ok = sys.version_info >= _MINIMUM
    return _check("python", ok, f"{sys.version.split()[0]} at {sys.executable}", "" if ok else "use Python 3.10 or newer")


def _packages() -> Check:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return _check("packages", False, f"missing: {', '.join(missing)}", f"run: {sys.executable} -m pip install 'remoted[daemon]'")
    return _check("packages", True, "the daemon's packages are installed")


def _uv() -> Check:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    advice = "" if found else "`dependencies=` cannot be served without it; run: pip install uv"
    return _check("uv", found is not None, found or "not found", advice)


def _nvml() -> Check:
    """Only whether the library loads: what it says, the daemon asks with a deadline."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        return without_driver(f"no NVIDIA driver library: {error}", nvidia_cards())
    return _check("nvml", True, "libnvidia-ml.so.1 loads")


def without_driver(problem: str, cards: list[str]) -> Check:
    """Well where there is nothing to drive."""
    if not cards:
        return _check("nvml", True, problem, "without it there are CPU workers only")
    found = f"{problem}, but an NVIDIA card is on the PCI bus ({', '.join(cards)})"
    advice = "install NVIDIA's driver (Debian: apt-get install nvidia-driver), restart, and see whether `nvidia-smi` lists the card; a container must be given it (--gpus all); until then there are CPU workers only"
    return _check("nvml", True, found, advice, warning=True)


def nvidia_cards(devices: Path = _PCI_DEVICES) -> list[str]:
    """The PCI addresses of those that the kernel sees, with a driver or without."""
    return sorted(device.name for device in devices.glob("*") if _id(device / "vendor") == _NVIDIA and _id(device / "class") >> 16 == _DISPLAY)


def _id(file: Path) -> int:
    try:
        return int(file.read_text(encoding="ascii"), 16)
    except (OSError, ValueError):
        return 0


def _state() -> Check:
    folder = paths.user_paths(dict(os.environ)).state
    return _check("state", True, f"{folder} on {paths.filesystem_type(folder) or 'an unknown file system'}")


def _disk() -> Check:
    folder = paths.user_paths(dict(os.environ)).state
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    ok = free > _FREE_BYTES
    return _check("disk space", ok, f"{size_text(free)} free", "" if ok else "results and environments need space: free some")


def _sockets() -> Check:
    path = Path(transport.socket_directory()) / "api.sock"
    # Root alone is let in all the same: others hear of it where they ask the daemon.
    if os.geteuid() == 0 and transport.socket_directory() == transport.SYSTEM_DIRECTORY and (shut := shut_out(path.parent)):
        return _check("socket path", False, f"{shut}: users are shut out", "`systemctl restart remoted.socket remoted` makes it as it was installed")
    length = len(os.fsencode(path)) + 1
    ok = length <= paths.SUN_PATH_BYTES
    advice = "" if ok else "set REMOTED_SOCKET to a shorter directory"
    return _check("socket path", ok, f"{path} ({length} of {paths.SUN_PATH_BYTES} bytes)", advice)


def shut_out(folder: Path) -> str:
    """What in the system's folder is root's alone, with its mode. A group other than root's may be meant."""
    for path, needed in ((folder, 1), (folder / "data.sock", 2), (folder / "api.sock", 2)):
        try:
            found = path.stat()
        except OSError:
            continue  # it does not answer then, which is another line
        if not found.st_mode & (needed | (needed << 3 if found.st_gid else 0)):
            return f"{path} has the mode {stat.S_IMODE(found.st_mode):04o}"
    return ""


def _daemon() -> list[Check]:
    """A daemon that does not run is no illness; one that does not answer is, and so is a socket of the system's behind which there is none."""
    try:
        return list(transport.get("/v1/doctor", timeout=_DAEMON_SECONDS)["checks"])
    except NoDaemon as error:
        return [_check("daemon", transport.socket_directory() != transport.SYSTEM_DIRECTORY, str(error))]
    except CliError as error:
        return [_check("daemon", False, str(error))]


def _configuration() -> Check:
    """Of the daemon that this command would ask: what it does not take may be why it does not start."""
    path, is_shared = configured()
    if closed := _closed(path):
        return _check("configuration", True, f"{closed} is not yours to read", "`sudo remotectl doctor` looks at it")
    reading = config_files.read(path, is_shared)
    problems = (*reading.fatal, *reading.problems)
    advice = "see `remotectl config check`" if problems else ""
    return _check("configuration", not reading.fatal, str(problems[0]) if problems else f"{path}{'' if path.exists() else ': not there, so the defaults hold'}", advice)


def _closed(path: Path) -> Path | None:
    """What of it this user may not read."""
    try:
        return next((file for file in config_files.files_of(path) if not os.access(file, os.R_OK)), None)
    except PermissionError:
        return path.parent


def configured() -> tuple[Path, bool]:
    """(the file of the daemon that this command would ask, is it everybody's)"""
    if transport.socket_directory() == transport.SYSTEM_DIRECTORY:
        return paths.system_paths(Path("/")).config, True
    return paths.user_paths(dict(os.environ)).config, False
