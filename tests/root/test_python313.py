"""The same package on Python 3.13, installed with pip into a new Debian tree, as a user without a daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import ROOT

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]
TREE = Path(os.environ.get("REMOTED_TEST_TREES") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remoted-tests") / "trixie"

SCRIPT = """
import asyncio, json, multiprocessing, sys
from dataclasses import dataclass
from remoted_client import CpuLiveLoadBalancer, CpuLiveServerless, Job, remote
queue, direct = CpuLiveServerless(name="q"), CpuLiveLoadBalancer(name="d")
STATE = None
@dataclass
class Point:
    x: int
def square(x): return x * x
@remote(queue)
async def add(a, b):
    global STATE
    STATE = (STATE or 0) + 1
    print("adding")
    return Point(a + b), STATE
@remote(direct)
def fails(): raise KeyError("home")
@remote(queue)
def numbers(n): yield from range(n)
@remote(queue, max_retries=0, timeout=60)
def pooled():
    with multiprocessing.get_context("forkserver").Pool(2) as pool: return pool.map(square, range(3))
if __name__ == "__main__":
    found = [asyncio.run(add(1, 2)).unwrap(), add(3, 4).result().unwrap()]
    assert [isinstance(p, Point) for p, _ in found] == [True, True], found
    try: fails().result()
    except KeyError as error: assert "fails" in error.remote_traceback
    assert list(numbers(5)) == [0, 1, 2, 3, 4] and pooled().result().unwrap() == [0, 1, 4]
    assert Job.from_id(add(5, 6).result().id).result().output[0] == Point(11)
    print(json.dumps([sys.version_info[:2], [p.x for p, _ in found]]))
"""


@pytest.fixture
def tree() -> Iterator[Path]:
    """The tree with this checkout in /src and everything else as debootstrap made it."""
    assert TREE.is_dir(), "run `make test-root`: it makes the tree"
    for name in ("src", "v", "home"):
        shutil.rmtree(TREE / name, ignore_errors=True)
    wanted = ("remoted", "client", "systemd", "examples", "pyproject.toml", "README.md")
    (TREE / "src").mkdir()
    for name in wanted:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, TREE / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, TREE / "src" / name)
    (TREE / "home").mkdir()
    yield TREE
    for name in ("src", "v", "home"):
        shutil.rmtree(TREE / name, ignore_errors=True)


def inside(tree: Path, command: str) -> str:
    """Run in the tree, in mount and process namespaces of its own: what it leaves running ends with it."""
    certificates = os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    shutil.copy("/etc/resolv.conf", tree / "etc" / "resolv.conf")
    if Path(certificates).exists():
        shutil.copy(certificates, tree / "etc" / "ca.crt")
    script = f"mount -t proc proc {tree}/proc && mount --bind /dev {tree}/dev && mount -t tmpfs tmpfs {tree}/tmp && exec chroot {tree} sh -ec '{command}'"
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/home", "LANG": "C.UTF-8", "SSL_CERT_FILE": "/etc/ca.crt", "PIP_CERT": "/etc/ca.crt"}
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", script], env=environ, capture_output=True, text=True, timeout=350, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def test_a_new_user_on_python_313_installs_with_pip_and_calls(tree: Path) -> None:
    (tree / "home" / "script.py").write_text(SCRIPT, encoding="utf-8")
    out = inside(
        tree,
        "python3 -m venv /v && /v/bin/pip install -q --disable-pip-version-check \"/src[daemon]\" && cd /home && /v/bin/python script.py && /v/bin/python script.py",
    )
    assert out.strip().splitlines()[-1] == "[[3, 13], [3, 7]]"
