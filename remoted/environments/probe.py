"""Run with ``python -c`` by a caller's interpreter (3.10 or newer): says what it is and what it has, as one JSON line.

It must import nothing outside the standard library and nothing of remoted. The line begins with the word given as
the first argument, because a sitecustomize module may print too.
"""

from __future__ import annotations

import sys

# The current directory is first on the path of ``-c``: a json.py there would be taken for the real one.
sys.path[:] = [entry for entry in sys.path if entry]

import importlib.metadata  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import site  # noqa: E402
import sysconfig  # noqa: E402


def main() -> None:
    folders = site_folders()
    stamps = {folder: stamp(folder) for folder in folders}  # before the look into them: a change during it shows
    facts = {
        "base": base_executable(),
        "version": platform.python_version(),
        "implementation": sys.implementation.name + getattr(sys, "abiflags", ""),
        "prefix": sys.prefix,
        "stamps": stamps,
        "packages": packages(),
    }
    print("\n" + sys.argv[1] + json.dumps(facts))


def base_executable() -> str:
    """The interpreter outside of any venv; in older versions ``_base_executable`` may name the venv's own."""
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    names = [os.path.join(sys.base_prefix, "bin", name), os.path.join(sys.base_prefix, "bin", "python3")]
    candidates = [getattr(sys, "_base_executable", ""), *names]
    outside = [path for path in candidates if path and os.path.exists(path) and not in_venv(path)]
    return outside[0] if outside else sys.executable


def in_venv(path: str) -> bool:
    return sys.prefix != sys.base_prefix and path.startswith(sys.prefix + os.sep)


def site_folders() -> list[str]:
    paths = sysconfig.get_paths()
    found = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        found.insert(0, site.getusersitepackages())
    return list(dict.fromkeys(path for path in found if os.path.isdir(path)))


def stamp(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_dev, found.st_ino, found.st_mtime_ns]


def packages() -> list[dict[str, object]]:
    """Of two with one name the first on the path counts, as at import."""
    found: dict[str, dict[str, object]] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        name, version = metadata["Name"], metadata["Version"]
        if name and version:
            extras = metadata.get_all("Provides-Extra") or []
            found.setdefault(name, {"name": name, "version": version, "requires": distribution.requires or [], "extras": extras})
    return list(found.values())


main()
