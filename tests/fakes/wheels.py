"""Tiny pure-Python wheels and callers' environments, so that tests of F14 need no index."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    modules: Mapping[str, str] | None = None,
    requires: Iterable[str] = (),
    extras: Mapping[str, Iterable[str]] | None = None,
) -> Path:
    """``modules``: module name -> source; ``extras``: name -> requirements. Without modules there is one that says the version."""
    stem = f"{name.replace('-', '_')}-{version}"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
    for extra, needed in (extras or {}).items():
        lines += [f"Provides-Extra: {extra}", *(f"Requires-Dist: {text} ; extra == '{extra}'" for text in needed)]
    files = {f"{module}.py": source for module, source in (modules or {name.replace("-", "_"): f"version = {version!r}\n"}).items()}
    files[f"{stem}.dist-info/METADATA"] = "\n".join(lines) + "\n"
    files[f"{stem}.dist-info/WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{stem}.dist-info/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{stem}.dist-info/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    return target


def make_source_project(folder: Path, name: str, version: str, source: str) -> Path:
    """A folder that looks like a project which was installed in editable mode; see ``install_editable``."""
    folder.mkdir(parents=True)
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    (folder / "VERSION").write_text(version, encoding="utf-8")
    return folder


def install_editable(site_packages: Path, project: Path, name: str) -> None:
    """What an editable install leaves: a .pth line and a dist-info with direct_url.json (no build backend is needed)."""
    version = (project / "VERSION").read_text(encoding="utf-8")
    (site_packages / f"__editable__.{name}.pth").write_text(f"{project}\n", encoding="utf-8")
    info = site_packages / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (info / "direct_url.json").write_text(f'{{"url": "{project.as_uri()}", "dir_info": {{"editable": true}}}}', encoding="utf-8")


_BACKEND = """
import os, time, zipfile
FLAG = {flag!r}

def _metadata(folder):
    os.makedirs(os.path.join(folder, "{stem}.dist-info"))
    with open(os.path.join(folder, "{stem}.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return "{stem}.dist-info"

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    return _metadata(folder)

def build_wheel(folder, config_settings=None, metadata_directory=None):
    if os.path.exists(FLAG):
        with open(FLAG, "w") as file:
            file.write(str(os.getpid()))
        while os.path.exists(FLAG):
            time.sleep(0.05)
    name = "{stem}-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr("{name}.py", "version = '{version}'\\n")
        wheel.writestr("{stem}.dist-info/METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        wheel.writestr("{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("{stem}.dist-info/RECORD", "")
    return name
"""


def make_slow_source(folder: Path, name: str, version: str, flag: Path) -> Path:
    """A source distribution whose build, while the file ``flag`` is there, writes its pid into it and waits."""
    stem = f"{name}-{version}"
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": _BACKEND.format(flag=str(flag), stem=stem, name=name, version=version),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{stem}.tar.gz"
    with tarfile.open(target, "w:gz") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(f"{stem}/{path}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return target


class Caller:
    """Somebody's own venv with packages from a folder of wheels."""

    def __init__(self, uv: Path, folder: Path, base: str) -> None:
        self._uv = uv
        self.folder = folder
        self._run("venv", "--no-project", "--python", base, str(folder))

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/*/site-packages"))

    def install(self, wheels: Path, *requirements: str) -> None:
        self._run("pip", "install", "--python", self.python, "--no-index", "--find-links", str(wheels), *requirements)

    def _run(self, *arguments: str) -> None:
        subprocess.run([str(self._uv), "--offline", "--no-config", "--quiet", *arguments], check=True)
