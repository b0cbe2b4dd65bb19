"""``worker.pyz``: the program inside every worker and fork server, zipped once per version of its parts.

It holds ``remoted/worker`` (as ``remoted_worker``), the client package and cloudpickle. Python puts the zip
first on ``sys.path``; its first lines move it last, so that the user's own packages win and these copies
are only the fallback. Interpreters of the daemon's own version find bytecode beside the worker's own
texts, others read the texts. The digest in the name keeps the file of a running worker when the daemon is upgraded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import py_compile
import sys
import tempfile
import zipfile
from pathlib import Path

import psutil

_MAIN = """\
import sys
sys.path.append(sys.path.pop(0))
if len(sys.argv) == 2:
    from remoted_worker.runtime import main
else:
    from remoted_worker.forkserver import main
main(*map(int, sys.argv[1:]))
"""
#: What no interpreter has but from here.
_OWN = ("__main__.py", "remoted_worker/")
_EPOCH = (1980, 1, 1, 0, 0, 0)


def _package_files(name: str) -> list[tuple[str, bytes]]:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"cannot find the package {name}; install remoted[daemon] again")
    root = Path(spec.origin).parent
    return [(path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(root.rglob("*.py"))]


def build(folder: Path) -> Path:
    """The zip in ``folder``, made unless it is there already; read-only for everybody."""
    files = [("__main__.py", _MAIN.encode())]
    for package, arcname in (("remoted.worker", "remoted_worker"), ("remoted_client", "remoted_client"), ("cloudpickle", "cloudpickle")):
        files += [(f"{arcname}/{relative}", data) for relative, data in _package_files(package)]
    parts = [str(sys.implementation.cache_tag).encode(), *(name.encode() + b"\0" + data for name, data in files)]
    target = folder / f"worker-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.pyz"
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            own = [(f"{name}c", _bytecode(data, f"{target}/{name}", Path(scratch))) for name, data in files if name.startswith(_OWN)]
            _write(target, _zip([*files, *own]))
    return target


def sweep(folder: Path, current: Path) -> None:
    """Drop those of earlier versions; a process that runs one reads on in it. Blocking."""
    others = [path for path in folder.iterdir() if path != current and path.name.startswith("worker-")]
    if not others:
        return
    words = {word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or ()}
    for path in others:
        if os.fspath(path) not in words:
            path.unlink(missing_ok=True)


def _bytecode(text: bytes, name: str, scratch: Path) -> bytes:
    """Not compared with its text when it is read (PEP 552); interpreters of another version do not read it."""
    source, compiled = scratch / "source.py", scratch / "source.pyc"
    source.write_bytes(text)
    py_compile.compile(os.fspath(source), os.fspath(compiled), name, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    return compiled.read_bytes()


def _zip(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    # Stored, not deflated: imports from it are on the path of every cold start.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
    return buffer.getvalue()


def _write(target: Path, data: bytes) -> None:
    part = target.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(data)
    part.chmod(0o444)
    part.rename(target)
