"""Debian's trees, booted: what happens in one boot is a script, and tests look at what it wrote down (``say NAME WORDS``)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.harness import ROOT
from tests.root.system_host import TREES

#: Of the product, and enough to build a wheel of it.
SOURCES = ("remoted", "client", "systemd", "pyproject.toml", "README.md")
_MADE = ("opt/remoted", "src", "wheels", "etc/uv", "v", "trial", "etc/remoted", "var/lib/remoted", "home/alice", "home/bob", "home/carl", "home/dora", "usr/local/bin/remotectl", "etc/systemd/system/trial.service")
_UNIT = "[Unit]\nAfter=multi-user.target\n[Service]\nType=oneshot\nEnvironment={environ}\nExecStart=/bin/bash /trial/trial.sh\n"
#: What scripts begin with: words for what is written down, for whom something runs, and for the daemon.
WORDS = r"""
exec 2>>/trial/log; set -x
say() { printf '%s\t%s\n' "$1" "$(tr '\n' ' ' <<<"$2")" >>/trial/said; }
as() { u=$1; shift; setpriv --reuid $u --regid $u --init-groups env -i HOME=/home/$u PATH=/usr/local/bin:/usr/bin:/bin timeout 60 "$@"; }
pid() { systemctl show -p MainPID --value remoted; }
cd /; id alice >/dev/null || { useradd -m alice; useradd -m bob; }
"""
#: What nspawn ends with when its computer wants to be started again (systemd-nspawn(1), --keep-unit), and how often a trial may.
_REBOOTS, _BOOTS_MOST = 133, 4
_LAST_WORDS = "\nsay end 1; sync\nsystemctl poweroff --force\n"


@contextlib.contextmanager
def booted(name: str, script: str, job: str, prepare: Callable[[Path], None] = lambda tree: None) -> Iterator[dict[str, str]]:
    """What the script wrote down, by name. ``job``: the users' script, /trial/job.py; ``prepare`` puts more into the tree, which is clean again afterwards."""
    tree = TREES / name
    assert tree.is_dir(), "run `make test-root`: it makes the tree"
    _clean(tree)
    try:
        _prepare(tree, script, job)
        prepare(tree)
        # Under a terminal of its own: systemd refuses to boot on a pipe.
        command = f"systemd-nspawn --quiet --directory={tree} --boot --register=no --keep-unit --console=read-only --machine=remoted-trial"
        for _ in range(_BOOTS_MOST):
            done = subprocess.run(["script", "-qefc", command, "/dev/null"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=480, check=False)
            if done.returncode != _REBOOTS:
                break
        lines = (tree / "trial/said").read_text(encoding="utf-8").splitlines()
        found = dict(line.split("\t", 1) for line in lines if "\t" in line)
        assert "end" in found, f"the trial did not come to its end:\n{lines}\n{(tree / 'trial/log').read_text(encoding='utf-8')[-6000:]}"
        yield found
    finally:
        _clean(tree)


def copy_sources(folder: Path) -> None:
    """This checkout, without what is made of it."""
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def _prepare(tree: Path, script: str, job: str) -> None:
    (tree / "trial").mkdir()
    copy_sources(tree / "src")
    certificates = os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    if Path(certificates).exists():
        shutil.copy(certificates, tree / "etc" / "ca.crt")
    (tree / "trial/job.py").write_text(job, encoding="utf-8")
    (tree / "trial/trial.sh").write_text(WORDS + script + _LAST_WORDS, encoding="utf-8")
    environ = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root SSL_CERT_FILE=/etc/ca.crt PIP_CERT=/etc/ca.crt"
    (tree / "etc/systemd/system/trial.service").write_text(_UNIT.format(environ=environ), encoding="utf-8")
    wanted = tree / "etc/systemd/system/multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    (wanted / "trial.service").symlink_to("../trial.service")


def _clean(tree: Path) -> None:
    for path in [*(tree / name for name in _MADE), *(tree / "opt").glob("remoted-*")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (tree / "etc/systemd/system/multi-user.target.wants/trial.service").unlink(missing_ok=True)
    for path in (tree / "etc/systemd/system").glob("**/remoted*"):
        path.unlink()
    subprocess.run(["chroot", str(tree), "sh", "-c", "userdel alice; userdel bob; userdel carl; userdel dora"], check=False, capture_output=True)
