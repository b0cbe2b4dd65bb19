"""Measure one card: ``python benchmarks/card/run.py --json FILE [--only NAME,...] [--sizes 1,8,24]``.

Needs a card that nobody uses, the driver's libcuda (570 or later), PyTorch in this interpreter and, for everything, root;
what cannot be done is said and passed over. Changes no setting of the card. Host memory held at a time stays below half of
what is free. Every section has a deadline, and what is known is written after each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.card.asked import Asked
from remoted import bpf
from remoted.gpu.enforce import instructions

GIB = 1 << 30
_HERE = Path(__file__).parent
_NOBODYS = (60001, 60002)
_SETTLE_SECONDS = 60.0


class Nvml:
    """What the driver says of card 0, by nvidia-ml-py."""

    def __init__(self) -> None:
        import pynvml

        self.nvml = pynvml
        pynvml.nvmlInit()
        self.card = pynvml.nvmlDeviceGetHandleByIndex(0)

    def used(self) -> int:
        return int(self.nvml.nvmlDeviceGetMemoryInfo(self.card).used)

    def processes(self) -> dict[int, int | None]:
        return {process.pid: process.usedGpuMemory for process in self.nvml.nvmlDeviceGetComputeRunningProcesses(self.card)}

    def answer(self, name: str, *arguments: Any) -> Any:
        try:
            found = getattr(self.nvml, name)(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return found.decode() if isinstance(found, bytes) else found if isinstance(found, (int, float, str, list)) else str(found)


def facts(nvml: Nvml) -> dict[str, Any]:
    def text(path: str) -> str:
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except OSError as error:
            return str(error)

    names = ["Name", "UUID", "MinorNumber", "PersistenceMode", "ComputeMode", "MigMode", "MaxMigDeviceCount", "UtilizationRates", "BAR1MemoryInfo"]
    symbols = subprocess.run(["bash", "-c", "nm -D $(ldconfig -p | grep -m1 libnvidia-ml.so.1 | sed 's/.*=> //') 2>/dev/null | grep -ciE 'MemoryLimits'"], capture_output=True, text=True)
    return {
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "memory": [line for line in text("/proc/meminfo").splitlines() if line.startswith(("MemTotal", "MemAvailable", "HugePages_Total"))],
        "driver": text("/proc/driver/nvidia/version"),
        "params": text("/proc/driver/nvidia/params"),
        "nodes": subprocess.run(["bash", "-c", "ls -l /dev/nvidia* /dev/nvidia-caps 2>&1"], capture_output=True, text=True).stdout.splitlines(),
        "cgroups": Path("/proc/self/mountinfo").read_text(encoding="utf-8").count("cgroup2"),
        "cgroup_mounts": [line for line in text("/proc/mounts").splitlines() if "cgroup" in line or " /dev " in line],
        "controllers": text("/sys/fs/cgroup/cgroup.controllers"),
        "yama": text("/proc/sys/kernel/yama/ptrace_scope"),
        "memory_limits_symbols": symbols.stdout.strip(),
        "nvml": {name: nvml.answer(f"nvmlDeviceGet{name}", nvml.card) for name in names},
        "versions": {name: nvml.answer(f"nvmlSystemGet{name}") for name in ("DriverVersion", "NVMLVersion", "CudaDriverVersion_v2")},
        "memory_limits": nvml.answer("nvmlDeviceSetMemoryLimits_v1", nvml.card, None),
        "used_with_nobody": nvml.used(),
        "smi": subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout[-1500:],
    }


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * 4096


def available() -> int:
    return next(int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable"))


@contextlib.contextmanager
def holding(library: str = "torch", size: int = 0, *, retired_by: Asked | None = None, **as_whom: Any) -> Iterator[Asked]:
    """``retired_by`` parks it before it is killed: the end of a live process that was restored once has hung whole hosts
    (NVIDIA/cuda-checkpoint #53)."""
    target = Asked(f"{_HERE}/target.py", library, **as_whom)
    try:
        if size and "died" not in target.hello:
            target.ask(f"hold {size}")
        yield target
    finally:
        if retired_by is not None and target.process.poll() is None:
            park(retired_by, target.pid)
        target.kill()


@contextlib.contextmanager
def controlling(**as_whom: Any) -> Iterator[Asked]:
    controller = Asked(f"{_HERE}/driver.py", **as_whom)
    try:
        yield controller
    finally:
        controller.kill()


def park(controller: Asked, pid: int) -> list[dict[str, Any]]:
    return [controller.ask(f"lock {pid}"), controller.ask(f"checkpoint {pid}")]


def restore(controller: Asked, pid: int) -> list[dict[str, Any]]:
    return [controller.ask(f"restore {pid}"), controller.ask(f"unlock {pid}")]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> float | None:
    begin = time.perf_counter()
    while not condition():
        if time.perf_counter() - begin > seconds:
            return None
        time.sleep(0.01)
    return time.perf_counter() - begin


def context(nvml: Nvml) -> dict[str, Any]:
    """What one idle process with a context costs, how long it takes to have one, and how soon a killed one's memory is back."""
    before = nvml.used()
    began = time.perf_counter()
    with holding() as target:
        small = {"hello": target.hello, "start_seconds": time.perf_counter() - began, "by_nvml": nvml.used() - before, "of_process": nvml.processes().get(target.pid, "not listed"), "rss": rss(target.pid)}
        target.ask(f"hold {40 * GIB}")
        full = {"of_process": nvml.processes().get(target.pid, "not listed"), "by_nvml": nvml.used() - before}
        begin = time.perf_counter()
        target.process.kill()
        free = until(lambda: nvml.used() - before < 256 << 20)
        dead = time.perf_counter() - begin
        target.process.wait()
        reaped = time.perf_counter() - begin
    with holding() as target:
        limit = target.ask("fraction 0.25")
    return {"idle": small, "with_40_GiB": full, "kill_to_free_seconds": free, "seen_free_seconds": dead, "reaped_seconds": reaped, "fraction": limit}


def parking(nvml: Nvml, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Rates by size; the first park touches new pages of the host, later ones may find them again."""
    found = []
    with controlling() as controller:
        for size in sizes:
            if size * GIB > available() // 2:
                found.append({"gib": size, "left_out": f"half of the free memory is {available() // 2 // GIB} GiB"})
                continue
            with holding(size=size * GIB, retired_by=controller) as target:
                sums = [target.ask("sum")["sum"]]
                entry: dict[str, Any] = {"gib": size, "state_before": controller.ask(f"state {target.pid}"), "rss_before": rss(target.pid), "used_before": nvml.used(), "rounds": []}
                for _ in range(rounds if size < 20 else min(rounds, 2)):
                    steps = park(controller, target.pid)
                    while_parked = {"rss": rss(target.pid), "used": nvml.used(), "listed": target.pid in nvml.processes()}
                    steps += restore(controller, target.pid)
                    begin = time.perf_counter()
                    sums.append(target.ask("sum").get("sum"))
                    entry["rounds"].append({"steps": steps, "parked": while_parked, "first_use_seconds": time.perf_counter() - begin})
                found.append({**entry, "rss_after": rss(target.pid), "same": len(set(sums)) == 1})
                print(json.dumps(found[-1]), flush=True)
    return found


def users(nvml: Nvml) -> dict[str, Any]:
    """Who may park whom: root another's, a user their own, a user another's."""
    found: dict[str, Any] = {}
    one, two = _NOBODYS
    with controlling() as root, holding(size=GIB, retired_by=root, user=one, group=one, extra_groups=[]) as target:
        if "died" in target.hello:
            return {"target": target.hello}
        for name, who in (("root", {}), ("itself", {"user": one, "group": one, "extra_groups": []}), ("another", {"user": two, "group": two, "extra_groups": []})):
            with controlling(**who) as controller:
                found[name] = {"init": controller.hello, "state": controller.ask(f"state {target.pid}")}
                if name == "another" and found[name]["state"]["code"] != 0:
                    found[name]["lock"] = controller.ask(f"lock {target.pid}")
                    continue
                found[name]["steps"] = [*park(controller, target.pid), *restore(controller, target.pid)]
        found["sum_after"] = target.ask("sum")
    return found


def crowded(nvml: Nvml) -> dict[str, Any]:
    """Parked while another process takes most of the card; with too little room; and when the other has gone."""
    with controlling() as controller, holding(size=16 * GIB, retired_by=controller) as target:
        before = target.ask("sum")
        parked = park(controller, target.pid)
        total = int(nvml.nvml.nvmlDeviceGetMemoryInfo(nvml.card).total)
        with holding(size=total - 6 * GIB) as other:
            crowd = {"other": other.ask("sum").get("died", "works"), "used": nvml.used()}
        gone = until(lambda: nvml.used() < 2 * GIB)
        restored = restore(controller, target.pid)
        return {"parked": parked, "crowd": crowd, "other_gone_seconds": gone, "restored": restored, "same": target.ask("sum") == before}


def too_little(nvml: Nvml) -> dict[str, Any]:
    """A restore that cannot succeed, of a process that is thrown away: what does it cost (hazard a)? Parked again or not, it is killed."""
    if "Open Kernel Module" in Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"):
        return {"left_out": "the broken process would have to be killed as it is, and with the open kernel module that may hang the host"}
    with controlling() as controller, holding(size=16 * GIB) as target:
        parked = park(controller, target.pid)
        total = int(nvml.nvml.nvmlDeviceGetMemoryInfo(nvml.card).total)
        with holding(size=total - 6 * GIB):
            failed = [controller.ask(f"restore {target.pid}"), controller.ask(f"state {target.pid}")]
            used = nvml.used()
        until(lambda: nvml.used() < 8 * GIB)
        again = [controller.ask(f"restore {target.pid}"), controller.ask(f"state {target.pid}"), controller.ask(f"unlock {target.pid}")]
        return {"parked": parked, "failed": failed, "used_after_failure": used, "again": again}


def killed(nvml: Nvml) -> dict[str, Any]:
    """The helper dies in the middle of a checkpoint, then of a restore (hazard i)."""
    found: dict[str, Any] = {}
    with controlling() as last, holding(size=16 * GIB, retired_by=last) as target:
        before = target.ask("sum")
        for operation in ("checkpoint", "restore"):
            with controlling() as first:
                if operation == "checkpoint":
                    first.ask(f"lock {target.pid}")
                first.begin(f"{operation} {target.pid}")
                time.sleep(0.5)
            begin = time.perf_counter()
            with controlling() as second:
                found[operation] = {"init": second.hello, "state": second.ask(f"state {target.pid}"), "settled_seconds": time.perf_counter() - begin}
                state = found[operation]["state"].get("state")
                if operation == "checkpoint" and state != "checkpointed":
                    found[operation]["again"] = second.ask(f"checkpoint {target.pid}")
                if operation == "restore":
                    found[operation]["then"] = [second.ask(f"restore {target.pid}"), second.ask(f"state {target.pid}"), second.ask(f"unlock {target.pid}")]
        found["same"] = target.ask("sum") == before
    return found


def libraries(nvml: Nvml) -> dict[str, Any]:
    """One park and restore of each library's process; managed memory is refused (hazard c)."""
    found: dict[str, Any] = {}
    environ = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with controlling() as controller:
        for library in ("jax", "cupy", "managed"):
            with holding(library, GIB if library != "managed" else GIB // 16, retired_by=controller, env=environ) as target:
                if "died" in target.hello:
                    found[library] = target.hello
                    continue
                before = target.ask("sum")
                mappings = Path(f"/proc/{target.pid}/maps").read_text(encoding="utf-8").count("/dev/nvidia-uvm")
                steps = [*park(controller, target.pid), controller.ask(f"state {target.pid}")]
                steps += restore(controller, target.pid)
                found[library] = {"uvm_mappings": mappings, "steps": steps, "same": target.ask("sum") == before}
    return found


def groups(nvml: Nvml) -> dict[str, Any]:
    """The kernel refuses the card: to a process that wants a context, to NVML, and to one that is parked (cgroup v2, eBPF)."""
    root = Path("/sys/fs/cgroup")
    if not (root / "cgroup.procs").exists():
        root = Path("/tmp/cgroup2")
        root.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "cgroup2", "none", str(root)], check=True)
    refused, lent = root / "card-refused", root / "card-lent"
    for folder, cards in ((refused, ()), (lent, (0,))):
        folder.mkdir(exist_ok=True)
        bpf.attach_to_group(folder, bpf.load_device_program(instructions(cards)))
    probe = "import ctypes; print(ctypes.CDLL('libcuda.so.1').cuInit(0))"
    commands = {
        "cuInit": [sys.executable, "-c", probe],
        "nvidia-smi": ["nvidia-smi", "-L"],
        "nvml": [sys.executable, "-c", "import pynvml as n; n.nvmlInit(); c = n.nvmlDeviceGetCount(); print(c); h = n.nvmlDeviceGetHandleByIndex(0); print(n.nvmlDeviceGetMemoryInfo(h).used, [p.pid for p in n.nvmlDeviceGetComputeRunningProcesses(h)])"],
        "torch": [sys.executable, "-c", "import torch; print(torch.cuda.is_available(), torch.cuda.device_count()); print(torch.zeros(1, device='cuda'))"],
    }
    found: dict[str, Any] = {}
    for folder in (refused, lent):
        found[folder.name] = {}
        for name, command in commands.items():
            done = subprocess.run(["bash", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "x", *command], capture_output=True, text=True, timeout=60)
            found[folder.name][name] = {"code": done.returncode, "out": done.stdout.strip()[-300:], "err": done.stderr.strip()[-300:]}
    with controlling() as controller, holding(size=2 * GIB, retired_by=controller) as target:
        before = target.ask("sum")
        (lent / "cgroup.procs").write_text(str(target.pid))
        steps = park(controller, target.pid)
        (refused / "cgroup.procs").write_text(str(target.pid))
        steps += [controller.ask(f"restore {target.pid}"), controller.ask(f"state {target.pid}")]
        (lent / "cgroup.procs").write_text(str(target.pid))
        steps += [controller.ask(f"restore {target.pid}"), controller.ask(f"unlock {target.pid}")]
        found["parked_and_refused"] = {"steps": steps, "same": target.ask("sum") == before}
    return found


def preloaded(nvml: Nvml) -> dict[str, Any]:
    """A forked child of a process that has imported PyTorch and not touched the card: how soon has it a context?"""
    program = """
import json, os, time
import torch
answers = []
for _ in range(5):
    begin = time.perf_counter()
    read, write = os.pipe()
    if os.fork() == 0:
        forked = time.perf_counter()
        torch.zeros(1, device="cuda"); torch.cuda.synchronize()
        os.write(write, json.dumps([forked - begin, time.perf_counter() - begin]).encode())
        os._exit(0)
    answers.append(json.loads(os.read(read, 200))); os.wait()
print(json.dumps(answers))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    return {"fork_then_context_seconds": json.loads(done.stdout) if done.returncode == 0 else done.stderr[-500:]}


SECTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "facts": (20, facts),
    "context": (50, context),
    "preloaded": (50, preloaded),
    "groups": (70, groups),
    "users": (40, users),
    "parking": (170, parking),
    "killed": (60, killed),
    "crowded": (60, crowded),
    "libraries": (70, libraries),
    "too_little": (60, too_little),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--sizes", default="1,8,24,48")
    parser.add_argument("--rounds", default=5, type=int)
    chosen = parser.parse_args()
    nvml = Nvml()
    found: dict[str, Any] = {"schema": 1, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    signal.signal(signal.SIGALRM, _too_late)
    for name in chosen.only.split(","):
        seconds, section = SECTIONS[name]
        begin = time.perf_counter()
        signal.alarm(seconds)
        try:
            more = ([int(size) for size in chosen.sizes.split(",")], chosen.rounds) if name == "parking" else ()
            found[name] = section(nvml, *more)
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
        finally:
            signal.alarm(0)
        print(f"{name}: {time.perf_counter() - begin:.1f} s", json.dumps(found[name])[:1500], flush=True)
        chosen.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os._exit(0)


def _too_late(*_: object) -> None:
    raise TimeoutError("the section's time is up")


if __name__ == "__main__":
    main()
