"""A computer in software: Debian 12 with cgroup v2 only, its own kernel, and a disk that outlives its power.

qemu translates every instruction (no KVM), so all is 10 to 20 times slower than here. A cut of its power is a SIGKILL of
qemu: whatever the kernel in it had not written is gone, and of what it had written and not flushed, what qemu still held
(decision 0045). There is no network; what runs in it is told over a serial port to ``vm_agent``.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness import ROOT, Run
from tests.root.system_host import TREES

#: How long anything in it may take before the test gives up; it is slow, and the host may be busy.
PATIENCE_SECONDS = 240.0
_BOOT = "root=/dev/vda rw console=ttyS0 quiet systemd.unified_cgroup_hierarchy=1 mitigations=off random.trust_cpu=on panic=-1"
_UNIT = "[Unit]\nDefaultDependencies=no\nAfter=local-fs.target systemd-sysctl.service\n[Service]\nExecStart=/usr/bin/python3 -I -S /usr/local/sbin/vm_agent.py\nOOMScoreAdjust=-900\n[Install]\nWantedBy=sysinit.target\n"
_IDLE = ("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer", "systemd-tmpfiles-clean.timer", "getty@tty1.service", "serial-getty@ttyS0.service")


@dataclass
class Command:
    """Something that runs in the machine, and what it has printed so far."""

    argv: list[str]
    lines: list[str] = field(default_factory=list)
    code: int | None = None


class Machine:
    """One computer. ``begin`` starts a command in it, ``run`` waits for its end; both as root unless told otherwise."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.folder = folder
        self._disk = folder / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "raw", str(self._disk)], check=True)
        self._qemu: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._commands: list[Command] = []
        self.boots: list[str] = []

    # -- power ---------------------------------------------------------------------------------------------

    def power_on(self) -> None:
        """Until its agent answers."""
        door = self.folder / "agent.sock"
        door.unlink(missing_ok=True)
        with (self.folder / "qemu.log").open("ab") as log:
            self._qemu = subprocess.Popen(self._command(door), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._commands, self._is_gone, before = [], False, len(self.boots)
        self._wire = socket.socket(socket.AF_UNIX)
        _until(lambda: self._is_connected(door), "qemu does not start", self.log)
        threading.Thread(target=self._listen, args=(self._wire,), daemon=True).start()
        self.wait(lambda: len(self.boots) > before, "it does not boot")

    def cut_power(self) -> None:
        """No last words and no last writes."""
        assert self._qemu is not None
        self._qemu.kill()
        self._qemu.wait()
        self._wire.close()

    def shut_down(self) -> None:
        """In order; its disk is whole afterwards."""
        assert self._qemu is not None
        self.begin("systemctl poweroff --force")
        self._qemu.wait(PATIENCE_SECONDS)
        self._wire.close()

    def close(self) -> None:
        if self._qemu is not None and self._qemu.poll() is None:
            self.cut_power()

    def _command(self, door: Path) -> list[str]:
        return [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048", "-nodefaults", "-no-reboot", "-display", "none"),
            *("-kernel", str(TREES / "machine/kernel"), "-initrd", str(TREES / "machine/first.cpio.gz"), "-append", _BOOT),
            *("-drive", f"file={self._disk},if=virtio,format=qcow2,cache=writeback"),
            *("-chardev", f"file,id=console,path={self.folder / 'console'},append=on", "-serial", "chardev:console"),
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={door},server=on,wait=off", "-device", "virtserialport,chardev=agent,name=remoted.agent"),
        ]

    def _is_connected(self, door: Path) -> bool:
        assert self._qemu is not None
        assert self._qemu.poll() is None, f"qemu ended:\n{self.log()}"
        with contextlib.suppress(OSError):
            self._wire.connect(str(door))
            return True
        return False

    # -- what runs in it -----------------------------------------------------------------------------------

    def begin(self, command: str, uid: int = 0, text: str = "") -> Command:
        """A line for the shell, and what it reads."""
        made = Command(["/bin/bash", "-c", command])
        with self._changed:
            self._commands.append(made)
            self._wire.sendall(json.dumps({"number": len(self._commands) - 1, "uid": uid, "argv": made.argv, "text": text}).encode() + b"\n")
        return made

    def run(self, command: str, uid: int = 0, text: str = "", check: bool = True) -> Run:
        found = self.end(self.begin(command, uid, text))
        assert not check or found.code == 0, f"{command}: exit code {found.code}\n{found.out}\n{self.log()}"
        return found

    def end(self, command: Command) -> Run:
        """Wait for its end."""
        self.wait(lambda: command.code is not None, f"{command.argv[-1]} does not end")
        assert command.code is not None
        return Run(command.code, "\n".join(command.lines), "")

    def wait(self, condition: Callable[[], Any], problem: str) -> None:
        """For something that its agent tells."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._is_gone, PATIENCE_SECONDS)
            assert condition(), f"{problem}:\n{self.log()}\n{[command.lines[-20:] for command in self._commands[-3:]]}"

    def script(self, name: str, *arguments: str, uid: int, text: str = "") -> Command:
        """A script of the image's, with the Python that the product was installed into."""
        return self.begin(shlex.join(["/opt/remoted/bin/python", f"/trial/{name}.py", *arguments]), uid, text)

    def log(self) -> str:
        return "".join((self.folder / name).read_text(encoding="utf-8", errors="replace")[-3000:] for name in ("qemu.log", "console") if (self.folder / name).exists())

    def _listen(self, wire: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), wire.makefile("rb") as file:
            for line in file:
                self._hear(json.loads(line))
        with self._changed:
            self._is_gone = wire is self._wire
            self._changed.notify_all()

    def _hear(self, said: dict[str, Any]) -> None:
        with self._changed:
            if "hello" in said:
                self.boots.append(said["hello"])
            elif "line" in said:
                self._commands[said["number"]].lines.append(said["line"])
            else:
                self._commands[said["number"]].code = said["code"]
            self._changed.notify_all()


def _until(condition: Callable[[], bool], problem: str, log: Callable[[], str]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"{problem}:\n{log()}"
        time.sleep(0.05)


# -- its first disk ----------------------------------------------------------------------------------------


def make_image(folder: Path, setup: str, files: dict[str, str]) -> Path:
    """Debian 12 with these files, after the commands of ``setup``, and a remotectl that has what it installs from."""
    assert (TREES / "machine/ready").exists(), "run `make test-root`: it makes the parts of the computer"
    tree = folder / "tree"
    subprocess.run(["cp", "-a", str(TREES / "bookworm"), str(tree)], check=True)
    shutil.rmtree(tree / "var/log/journal", ignore_errors=True)
    shutil.copytree(TREES / "wheels", tree / "wheels")
    subprocess.run([str(ROOT / ".venv/bin/uv"), "build", "--quiet", "--wheel", "--out-dir", str(tree / "wheels"), str(ROOT)], check=True)
    shutil.copy(Path(__file__).with_name("vm_agent.py"), tree / "usr/local/sbin/vm_agent.py")
    (tree / "etc/fstab").write_text("", encoding="ascii")
    (tree / "etc/hostname").write_text("trial\n", encoding="ascii")
    for name, text in {"etc/systemd/system/agent.service": _UNIT, "etc/uv/uv.toml": 'no-index = true\nfind-links = ["/wheels"]\n', **files}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")
    wheel = next((tree / "wheels").glob("remoted-*.whl")).name
    lines = [setup]
    lines += ["systemctl --quiet enable agent.service", f"systemctl --quiet mask {' '.join(_IDLE)}"]
    lines += ["python3 -m venv --without-pip /v", "unzip_uv=/wheels/uv-*.whl; python3 -m zipfile -e $unzip_uv /tmp/uv && chmod +x /tmp/uv/uv-*/scripts/uv"]
    lines += [f"UV_CACHE_DIR=/tmp/cache /tmp/uv/uv-*/scripts/uv pip install --quiet --python /v/bin/python --no-index --find-links /wheels 'remoted[daemon] @ file:///wheels/{wheel}'", "rm -rf /tmp/uv /tmp/cache"]
    done = subprocess.run(["chroot", str(tree), "bash", "-ec", "\n".join(lines)], env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    image = folder / "first.img"
    subprocess.run(["truncate", "-s", "2G", str(image)], check=True)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(image)], check=True)
    shutil.rmtree(tree)
    return image


@contextlib.contextmanager
def machine(image: Path) -> Iterator[Machine]:
    """With a disk of its own over ``image``, on and off."""
    folder = Path(tempfile.mkdtemp(prefix="rvm-"))
    made = Machine(folder, image)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)
