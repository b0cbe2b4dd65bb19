"""``worker.pyz``: the program inside every worker and fork server, zipped once per version of its parts.

It holds ``remoted/worker`` (as ``remoted_worker``), the client package and cloudpickle. Python puts the zip
first on ``sys.path``; its first lines move it last, so that the user's own packages win and these copies
are only the fallback. The digest in the name keeps the file of a running worker when the daemon is upgraded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import zipfile
from pathlib import Path

_MAIN = """\
import sys
sys.path.append(sys.path.pop(0))
if len(sys.argv) == 2:
    from remoted_worker.runtime import main
else:
    from remoted_worker.forkserver import main
main(*map(int, sys.argv[1:]))
"""
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
    digest = hashlib.sha256(b"".join(name.encode() + b"\0" + data for name, data in files)).hexdigest()[:16]
    target = folder / f"worker-{digest}.pyz"
    if not target.exists():
        _write(target, _zip(files))
    return target


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
