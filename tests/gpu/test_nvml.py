"""Devices as facts (SURFACE row C07), read by the real pynvml from the fake driver.

pynvml keeps one library a process, so each scenario runs in a child that changes the board, asks and reports JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.nvml import build_library

GIB = 1 << 30

_PRELUDE = """
import asyncio, json, os, subprocess, sys, threading
from dataclasses import asdict
from pathlib import Path
from remoted.gpu.nvml import Nvml, NvmlError
from tests.fakes.nvml.board import GIB, Board, Fault, claim

board = Board(Path(os.environ["REMOTED_FAKE_BOARD"]))
library = os.environ.get("FAKE_LIBRARY")

def report(**facts):
    print(json.dumps(facts, default=asdict))

async def error_of(question):
    try:
        await question
    except NvmlError as error:
        return str(error)
    return None

def ended_pid():
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid

async def main():
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("fake-driver"))


class Scenario:
    """Runs the body of an async function beside a board, and returns what it reported."""

    def __init__(self, folder: Path, library: Path | None) -> None:
        self._environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "REMOTED_FAKE_BOARD": str(folder / "board"),
        }
        if library is not None:
            self._environment["FAKE_LIBRARY"] = str(library)

    def run(self, body: str, **environment: str) -> dict[str, Any]:
        program = _PRELUDE + textwrap.indent(textwrap.dedent(body), "    ") + "\nasyncio.run(main())\n"
        child = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            env=self._environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        assert not child.stderr
        reported: dict[str, Any] = json.loads(child.stdout)
        return reported


@pytest.fixture
def scenario(tmp_path: Path, library: Path) -> Scenario:
    return Scenario(tmp_path, library)


def test_c07_a_host_without_driver_has_no_devices_and_never_imports_pynvml(tmp_path: Path) -> None:
    if _has_real_driver():
        pytest.skip("this host has a driver")
    answer = Scenario(tmp_path, None).run("""
        nvml = Nvml()
        asked = [await nvml.devices(), await nvml.uses(), await nvml.driver_version(), await nvml.driver_cuda_version()]
        report(asked=asked, imported="pynvml" in sys.modules)
    """)

    assert answer == {"asked": [[], [], None, None], "imported": False}


def test_c07_a_driver_that_is_installed_but_not_loaded_is_no_gpu(scenario: Scenario) -> None:
    answer = scenario.run("""
        nvml = Nvml(library)
        before = await nvml.devices()
        board.add_gpu()
        board.write()
        report(before=before, version=await nvml.driver_version(), after=len(await nvml.devices()))
    """)

    assert answer == {"before": [], "version": "580.95.05", "after": 1}


def test_c07_the_systems_library_is_found_by_the_dynamic_linker(scenario: Scenario, library: Path) -> None:
    answer = scenario.run(
        """
        board.add_gpu("NVIDIA GeForce RTX 4090")
        board.write()
        report(names=[device.name for device in await Nvml().devices()])
        """,
        LD_LIBRARY_PATH=str(library.parent),
    )

    assert answer == {"names": ["NVIDIA GeForce RTX 4090"]}


def test_c07_devices_are_facts_by_uuid(scenario: Scenario) -> None:
    answer = scenario.run("""
        board.add_gpu("NVIDIA GeForce RTX 3090", memory_bytes=24 * GIB, minor=3)
        board.add_gpu("NVIDIA H200", memory_bytes=141 * GIB, compute_capability=None, minor=1)
        board.write()
        nvml = Nvml(library)
        cuda, devices = await nvml.driver_cuda_version(), await nvml.devices()
        nvml.close()
        report(cuda=cuda, devices=devices, threads=threading.active_count())
    """)

    assert answer["cuda"] == [13, 0]
    assert answer["threads"] == 1
    first, second = answer["devices"]
    assert first == {
        "uuid": "GPU-00000000-0000-0000-0000-000000000001",
        "index": 0,
        "minor": 3,
        "name": "NVIDIA GeForce RTX 3090",
        "memory_bytes": 24 * GIB,
        "compute_capability": [8, 6],
    }
    assert (second["index"], second["minor"], second["compute_capability"]) == (1, 1, None)


def test_c07_unified_memory_is_the_hosts(scenario: Scenario) -> None:
    answer = scenario.run("""
        card = board.add_gpu("NVIDIA GB10", compute_capability=(12, 1))
        for function in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2"):
            board.set_fault(Fault.NOT_SUPPORTED, function=function, uuid=card)
        board.write()
        nvml = Nvml(library)
        report(devices=await nvml.devices(), uses=await nvml.uses())
    """)

    assert answer["devices"][0]["memory_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert answer["uses"][0]["memory_used_bytes"] is None


def test_c07_a_strangers_process_appears_and_vanishes(scenario: Scenario) -> None:
    answer = scenario.run("""
        card = board.add_gpu()
        board.set_fact(card, "utilization", 87)
        board.write()
        nvml = Nvml(library)
        uses = [await nvml.uses()]
        board.add_process(card, os.getppid(), 5 * GIB)
        board.write()
        uses.append(await nvml.uses())
        board.remove_process(card, os.getppid())
        board.write()
        uses.append(await nvml.uses())
        report(pid=os.getppid(), uses=uses)
    """)

    before, during, after = ((use["memory_used_bytes"], use["processes"]) for (use,) in answer["uses"])
    assert before == after == (0, [])
    assert during == (5 * GIB, [{"pid": answer["pid"], "used_bytes": 5 * GIB, "graphics_only": False}])
    assert answer["uses"][0][0]["utilization_percent"] == 87


def test_c07_a_process_may_charge_its_own_memory_to_the_board(scenario: Scenario) -> None:
    answer = scenario.run("""
        card, other = board.add_gpu(), board.add_gpu()
        board.write()
        for used_bytes in (GIB, 2 * GIB):
            claim(board.path, card, used_bytes)
        ended = f"from tests.fakes.nvml.board import *; claim(Path({str(board.path)!r}), {other!r}, GIB)"
        subprocess.run([sys.executable, "-c", ended], check=True)
        report(pid=os.getpid(), uses=await Nvml(library).uses())
    """)

    assert [use["processes"] for use in answer["uses"]] == [[{"pid": answer["pid"], "used_bytes": 2 * GIB, "graphics_only": False}], []]


def test_c07_the_drivers_own_reserve_is_not_use(scenario: Scenario) -> None:
    answer = scenario.run("""
        card = board.add_gpu()
        board.set_fact(card, "reserved", GIB)
        board.write()
        nvml = Nvml(library)
        new = await nvml.uses()
        board.set_fault(Fault.FUNCTION_NOT_FOUND, function="nvmlDeviceGetMemoryInfo_v2")
        board.write()
        report(new=new[0].memory_used_bytes, old=(await nvml.uses())[0].memory_used_bytes)
    """)

    assert answer == {"new": 0, "old": GIB}


def test_c07_compute_and_graphics_are_one_process_and_who_only_draws_is_told_apart(scenario: Scenario) -> None:
    answer = scenario.run("""
        card = board.add_gpu()
        board.add_process(card, 1, GIB // 2, "C")
        board.add_process(card, os.getpid(), 3 * GIB, "CG")
        board.add_process(card, os.getppid(), GIB, "G")
        board.write()
        report(pids=[os.getpid(), os.getppid()], uses=await Nvml(library).uses())
    """)

    own, parent = answer["pids"]
    expected = [
        {"pid": 1, "used_bytes": GIB // 2, "graphics_only": False},
        {"pid": own, "used_bytes": 3 * GIB, "graphics_only": False},
        {"pid": parent, "used_bytes": GIB, "graphics_only": True},
    ]
    assert answer["uses"][0]["processes"] == sorted(expected, key=lambda process: process["pid"])


def test_c07_nobody_only_draws_where_the_compute_list_cannot_be_read(scenario: Scenario) -> None:
    answer = scenario.run("""
        card = board.add_gpu()
        board.add_process(card, os.getpid(), GIB, "G")
        for version in ("v2", "v3"):
            board.set_fault(Fault.NOT_SUPPORTED, function=f"nvmlDeviceGetComputeRunningProcesses_{version}")
        board.write()
        report(uses=await Nvml(library).uses())
    """)

    assert [process["graphics_only"] for process in answer["uses"][0]["processes"]] == [False]


def test_c07_the_drivers_cuda_version_is_two_numbers_or_unknown(scenario: Scenario) -> None:
    answer = scenario.run("""
        board.set_cuda(12, 2)
        board.write()
        nvml = Nvml(library)
        told = await nvml.driver_cuda_version()
        board.set_fault(Fault.NOT_SUPPORTED, function="nvmlSystemGetCudaDriverVersion_v2")
        board.write()
        report(told=told, silent=await nvml.driver_cuda_version())
    """)

    assert answer == {"told": [12, 2], "silent": None}


def test_c07_hidden_memory_is_none_and_the_process_stays(scenario: Scenario) -> None:
    answer = scenario.run("""
        card = board.add_gpu()
        board.add_process(card, os.getpid(), None)
        board.write()
        report(pid=os.getpid(), uses=await Nvml(library).uses())
    """)

    assert answer["uses"][0]["processes"] == [{"pid": answer["pid"], "used_bytes": None, "graphics_only": False}]


def test_c07_more_memory_than_the_board_has_is_not_believed(scenario: Scenario) -> None:
    answer = scenario.run("""
        card = board.add_gpu(memory_bytes=8 * GIB)
        board.add_process(card, os.getpid(), 9 * GIB)
        board.write()
        report(pid=os.getpid(), uses=await Nvml(library).uses())
    """)

    (use,) = answer["uses"]
    assert use["processes"] == [{"pid": answer["pid"], "used_bytes": None, "graphics_only": False}]
    assert use["memory_used_bytes"] is None


@pytest.mark.parametrize("sees_host_pids", [True, False])
def test_c07_a_pid_we_cannot_see_is_gone_or_somebody_in_another_namespace(
    scenario: Scenario, sees_host_pids: bool
) -> None:
    answer = scenario.run(f"""
        card = board.add_gpu()
        pid = ended_pid()
        board.add_process(card, pid, GIB)
        board.write()
        report(pid=pid, uses=await Nvml(library, sees_host_pids={sees_host_pids}).uses())
    """)

    kept = [] if sees_host_pids else [{"pid": answer["pid"], "used_bytes": GIB, "graphics_only": False}]
    assert answer["uses"][0]["processes"] == kept


def test_c07_garbage_of_an_unfitting_library_keeps_the_device_taken(scenario: Scenario) -> None:
    answer = scenario.run("""
        card = board.add_gpu()
        for pid in (os.getpid(), os.getppid()):
            board.add_process(card, pid, GIB)
        board.set_old_layout()
        board.write()
        report(uses=await Nvml(library, sees_host_pids=True).uses())
    """)

    processes = answer["uses"][0]["processes"]
    assert len(processes) >= 2
    assert all(process["used_bytes"] is None for process in processes if process["pid"] > 1 << 22)


def test_c07_slices_stand_in_for_a_card_in_mig_mode(scenario: Scenario) -> None:
    answer = scenario.run("""
        board.add_gpu("NVIDIA A100 80GB PCIe", mig=False, compute_capability=(8, 0))
        card = board.add_gpu("NVIDIA A100-SXM4-80GB", mig=True, compute_capability=(8, 0), minor=5)
        slices = [
            board.add_slice(card, f"NVIDIA A100-SXM4-80GB MIG {size}", memory_bytes=memory, place=place)
            for size, memory, place in (("3g.40gb", 40 * GIB, 0), ("1g.10gb", 10 * GIB, 4))
        ]
        board.add_process(slices[1], os.getpid(), GIB)
        board.write()
        nvml = Nvml(library)
        report(slices=slices, devices=await nvml.devices(), uses=await nvml.uses(), lost=nvml.lost)
    """)

    _, *slices = answer["devices"]
    assert [device["uuid"] for device in slices] == answer["slices"]
    assert [device["name"].split()[-1] for device in slices] == ["3g.40gb", "1g.10gb"]
    assert all((device["minor"], device["compute_capability"], device["index"]) == (5, [8, 0], 1) for device in slices)
    assert [use["utilization_percent"] for use in answer["uses"]] == [0, None, None]
    assert [len(use["processes"]) for use in answer["uses"]] == [0, 0, 1]
    assert answer["lost"] == []


def test_c07_a_card_in_mig_mode_without_slices_offers_nothing(scenario: Scenario) -> None:
    answer = scenario.run("""
        board.add_gpu("NVIDIA H100 PCIe", mig=True)
        board.write()
        nvml = Nvml(library)
        report(devices=await nvml.devices(), lost=nvml.lost)
    """)

    assert answer == {"devices": [], "lost": []}


@pytest.mark.parametrize("function", ["*", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetMemoryInfo_v2"])
def test_c07_a_lost_card_does_not_hide_the_others(scenario: Scenario, function: str) -> None:
    answer = scenario.run(f"""
        sick, well = board.add_gpu("NVIDIA A40"), board.add_gpu("NVIDIA L40S")
        board.write()
        nvml = Nvml(library)
        healthy = (len(await nvml.devices()), nvml.lost)
        board.set_fault(Fault.GPU_IS_LOST, function={function!r}, uuid=sick)
        board.write()
        uses = await nvml.uses()
        devices = await nvml.devices()
        lost = nvml.lost
        board.clear_faults()
        board.write()
        again = (len(await nvml.devices()), nvml.lost)
        report(healthy=healthy, uses=len(uses), devices=devices, lost=lost, again=again)
    """)

    assert answer["healthy"] == answer["again"] == [2, []]
    assert answer["uses"] == 1
    assert [(device["name"], device["index"]) for device in answer["devices"]] == [("NVIDIA L40S", 1)]
    assert answer["lost"] == ["GPU 0 (NVIDIA A40, GPU-00000000-0000-0000-0000-000000000001): GPU is lost"]


def test_c07_a_card_whose_processes_are_secret_is_not_offered_as_free(scenario: Scenario) -> None:
    answer = scenario.run("""
        card = board.add_gpu()
        function = "nvmlDeviceGetComputeRunningProcesses_v3"
        board.set_fault(Fault.NO_PERMISSION, function=function, uuid=card)
        board.write()
        nvml = Nvml(library)
        report(uses=await nvml.uses(), lost=nvml.lost)
    """)

    assert answer["uses"] == []
    assert "Insufficient Permissions" in answer["lost"][0]


@pytest.mark.parametrize("function", ["*", "nvmlDeviceGetCount_v2", "nvmlDeviceGetName"])
def test_c07_an_upgraded_driver_is_explained_and_asked_again(scenario: Scenario, function: str) -> None:
    answer = scenario.run(f"""
        board.add_gpu()
        board.set_fault(Fault.LIB_RM_VERSION_MISMATCH, function={function!r})
        board.write()
        nvml = Nvml(library)
        error = await error_of(nvml.devices())
        board.clear_faults()
        board.write()
        report(error=error, suspect=nvml.suspect, after=len(await nvml.devices()))
    """)

    assert "the driver was upgraded" in answer["error"]
    assert "reload the driver or reboot" in answer["error"]
    assert (answer["suspect"], answer["after"]) == (False, 1)


def test_c07_a_configured_library_that_is_not_there_is_an_error(scenario: Scenario, tmp_path: Path) -> None:
    answer = scenario.run(f"""
        report(error=await error_of(Nvml({str(tmp_path / "absent.so")!r}).devices()))
    """)

    assert answer["error"].startswith("cannot load NVML: ")
    assert "absent.so" in answer["error"]


def test_c07_a_hung_driver_costs_one_deadline_and_one_thread(scenario: Scenario) -> None:
    answer = scenario.run("""
        board.add_gpu()
        board.write()
        imported_by = Nvml(library)
        await imported_by.devices()
        imported_by.close()
        nvml = Nvml(library, deadline_seconds=0.5)
        assert len(await nvml.devices()) == 1
        board.set_hang(function="nvmlDeviceGetMemoryInfo_v2")
        board.write()
        together = await asyncio.gather(error_of(nvml.uses()), error_of(nvml.devices()))
        suspect = nvml.suspect
        loop = asyncio.get_running_loop()
        began = loop.time()
        later = {await error_of(nvml.uses()) for _ in range(100)}
        at_once = loop.time() - began < 0.5
        threads = threading.active_count()
        board.clear_faults()
        board.write()
        while nvml.suspect:
            await asyncio.sleep(0)
        report(
            together=together, suspect=suspect, later=sorted(later), at_once=at_once, threads=threads,
            healed=len(await nvml.devices()), threads_after=threading.active_count(),
        )
    """)

    (message,) = {*answer["together"], *answer["later"]}
    assert message.startswith("NVML did not answer within 0.5 s")
    assert answer["suspect"]
    assert answer["at_once"]
    assert answer["threads"] == answer["threads_after"] == 2
    assert answer["healed"] == 1


def test_c07_the_event_loop_runs_while_the_driver_hangs(scenario: Scenario) -> None:
    answer = scenario.run("""
        board.add_gpu()
        board.set_hang()
        board.write()
        nvml = Nvml(library, deadline_seconds=30)
        question = asyncio.ensure_future(nvml.devices())
        for _ in range(1000):
            await asyncio.sleep(0)
        unanswered = not question.done()
        board.clear_faults()
        board.write()
        report(unanswered=unanswered, devices=len(await question))
    """)

    assert answer == {"unanswered": True, "devices": 1}


def test_c07_closing_and_exiting_leave_a_hung_call_behind(scenario: Scenario) -> None:
    answer = scenario.run("""
        board.add_gpu()
        board.set_hang(at_most_seconds=3600)
        board.write()
        nvml = Nvml(library, deadline_seconds=0.1)
        await error_of(nvml.devices())
        nvml.close()
        nvml.close()
        report(suspect=nvml.suspect, error=await error_of(nvml.devices()))
    """)

    assert answer["suspect"]
    assert answer["error"].startswith("NVML did not answer")


def test_c07_a_closed_nvml_refuses_and_a_new_one_starts_afresh(scenario: Scenario) -> None:
    answer = scenario.run("""
        board.add_gpu()
        board.write()
        first, second = Nvml(library), Nvml(library)
        await first.devices()
        first.close()
        error = await error_of(first.devices())
        report(error=error, second=len(await second.devices()))
    """)

    assert answer == {"error": "cannot ask NVML: it was closed", "second": 1}


def test_a_fake_driver_that_does_not_compile_shows_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\necho 'fake_nvml.c:1: error: no such thing' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    with pytest.raises(RuntimeError, match="no such thing"):
        build_library(tmp_path / "cache")


def test_c07_a_real_card_is_what_nvidia_smi_says() -> None:
    if not _has_real_driver():
        pytest.skip("NO REAL GPU HERE: nothing was compared with nvidia-smi")
    columns = "uuid,name,memory.total,compute_cap"
    query = ["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits"]
    said = [line.split(", ") for line in subprocess.check_output(query, text=True).splitlines()]
    program = """
import asyncio, json
from dataclasses import asdict
from remoted.gpu.nvml import Nvml
print(json.dumps([asdict(device) for device in asyncio.run(Nvml(deadline_seconds=60).devices())]))
"""
    devices = json.loads(subprocess.check_output([sys.executable, "-c", program], text=True))

    assert [[device["uuid"], device["name"]] for device in devices] == [row[:2] for row in said]
    assert [device["memory_bytes"] >> 20 for device in devices] == [int(row[2]) for row in said]
    assert [".".join(map(str, device["compute_capability"])) for device in devices] == [row[3] for row in said]


def _has_real_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()
