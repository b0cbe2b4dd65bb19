"""SURFACE C07 and the GPU half of F29: who gets which card, when, and who has to wait for whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.nvml.board import GIB, Fault, Lists
from tests.fakes.wheels import make_wheel
from tests.gpu.conftest import GpuHost
from tests.harness import Host, wait_until

HEAD = """
import asyncio, json, os, sys, time
from pathlib import Path
from remoted_client import *
from remoted_client import remote, LiveServerless, LiveLoadBalancer, CpuLiveServerless, GpuGroup, GpuType
gpu = LiveServerless(name="gpu")
other = LiveServerless(name="other")
def until(path):
    while not os.path.exists(path): time.sleep(0.01)
def reason(handle, wanted):
    "Wait until the handle says why it waits."
    end = time.time() + 20
    while handle.state_reason() != wanted:
        assert time.time() < end and not handle.done(), (handle.state_reason(), handle.status())
        time.sleep(0.01)
@remote(gpu, max_retries=0)
def span(seconds=0.0):
    began = time.time(); time.sleep(seconds)
    return [began, time.time(), os.environ.get("CUDA_VISIBLE_DEVICES")]
@remote(other, max_retries=0)
def other_span(seconds=0.0):
    began = time.time(); time.sleep(seconds)
    return [began, time.time(), os.environ.get("CUDA_VISIBLE_DEVICES")]
@remote(gpu, max_retries=0)
def hold(path):
    Path(path + ".began").touch()
    while not os.path.exists(path): time.sleep(0.01)
    return os.getpid()
base = sys.argv[1]
"""


def run(host: Host, script: str, **environ: str) -> Any:
    return host.run(HEAD + script, str(host.project / "x"), **environ).json


def remotectl(on: GpuHost, *arguments: str) -> str:
    program = "from remoted.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, *arguments], env=on.host.environ, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


class Stranger:
    """A process outside of the daemon that uses a card."""

    def __init__(self, on: GpuHost, uuid: str, used_bytes: int = 5 * GIB, lists: Lists = "C") -> None:
        self._on, self._uuid = on, uuid
        self.process = subprocess.Popen(["sleep", "600"])
        on.board.add_process(uuid, self.process.pid, used_bytes, lists)
        on.board.write()

    def leave(self) -> None:
        self.process.kill()
        self.process.wait()
        self._on.board.remove_process(self._uuid, self.process.pid)
        self._on.board.write()


def test_c07_a_lease_is_exclusive_and_the_body_sees_its_card_alone(gpu_host: GpuHost) -> None:
    uuid = gpu_host.board.add_gpu()
    found = run(
        gpu_host.start().host,
        """
cpu = CpuLiveServerless(name="cpu")
@remote(cpu)
def visible(): return os.environ.get("CUDA_VISIBLE_DEVICES")
handles = [span(0.3), other_span(0.3), span(0.3)]
outs = [h.result() for h in handles]
spans = sorted(o.output[:2] for o in outs)
print(json.dumps([all(a[1] <= b[0] for a, b in zip(spans, spans[1:])), [o.output[2] for o in outs], [o.gpu for o in outs], visible().result().output]))
""",
        CUDA_VISIBLE_DEVICES="7",
    )
    assert found == [True, [uuid] * 3, [[uuid]] * 3, ""], "a CPU worker on a GPU host sees no card"


def test_c07_the_same_pool_uses_both_cards_and_keeps_its_worker_warm(gpu_host: GpuHost) -> None:
    uuids = {gpu_host.board.add_gpu(), gpu_host.board.add_gpu()}
    found = run(
        gpu_host.start().host,
        """
outs = [h.result() for h in [span(0.5), span(0.5)]]
again = span().result()
print(json.dumps([[o.output for o in outs], again.worker_id in [o.worker_id for o in outs]]))
""",
    )
    (first, second), warm = found
    assert first[1] > second[0], "they overlapped"
    assert {first[2], second[2]} == uuids
    assert warm


def test_c07_an_idle_worker_makes_room_for_another_pool_and_is_dead_before_its_card_is_lent(gpu_host: GpuHost) -> None:
    gpu_host.board.add_gpu()
    found = run(
        gpu_host.start().host,
        """
@remote(gpu)
def who(): return os.getpid()
@remote(other)
def alive(pid): return os.path.exists(f"/proc/{pid}")
pid = who().result().output
first = alive(pid).result()
print(json.dumps([first.output, who().result().output != pid]))
""",
    )
    assert found == [False, True]


def test_c07_a_stranger_makes_a_job_wait_and_its_leaving_starts_it(gpu_host: GpuHost) -> None:
    card = gpu_host.board.add_gpu()
    host = gpu_host.start().host
    stranger = Stranger(gpu_host, card)
    process = host.popen(
        HEAD
        + """
h = span()
reason(h, "FOREIGN_GPU_USE")
cpu = CpuLiveServerless(name="cpu")
@remote(cpu)
def plain(): return 1
assert plain().result().output == 1
print("waits", flush=True)
print(json.dumps(h.result().output[2]))
""",
        str(host.project / "x"),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n", process.communicate()[1]
    finally:
        stranger.leave()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert json.loads(out) == card


def test_c07_a_card_that_drives_a_monitor_is_lent_and_shows_who_draws(gpu_host: GpuHost) -> None:
    card = gpu_host.board.add_gpu()
    desktop = Stranger(gpu_host, card, 300 << 20, "G")
    try:
        host = gpu_host.start().host
        assert run(host, "print(json.dumps([span().result().output[2], other_span().result().output[2]]))") == [card, card]
        (shown,) = gpu_host.look()["gpus"]
        assert [process["pid"] for process in shown["foreign"]] == [desktop.process.pid]
        assert f"outside: pid {desktop.process.pid} sleep" in remotectl(gpu_host, "gpus")
    finally:
        desktop.leave()


@pytest.mark.parametrize(("used_bytes", "lists"), [(4 * GIB, "G"), (200 << 20, "CG")], ids=["game", "desktop that computes"])
def test_c07_who_draws_much_or_computes_as_well_takes_the_card(gpu_host: GpuHost, used_bytes: int, lists: Lists) -> None:
    card = gpu_host.board.add_gpu()
    desktop = Stranger(gpu_host, card, 300 << 20, "G")
    stranger = Stranger(gpu_host, card, used_bytes, lists)
    host = gpu_host.start().host
    process = host.popen(HEAD + 'h = span(); reason(h, "FOREIGN_GPU_USE"); print("waits", flush=True); print(json.dumps(h.result().output[2]))', str(host.project / "x"))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n", process.communicate()[1]
        assert stranger.process.pid in [shown["pid"] for shown in gpu_host.look()["gpus"][0]["foreign"]]
        stranger.leave()
        out, err = process.communicate(timeout=30)
    finally:
        stranger.process.kill()
        desktop.leave()
    assert process.returncode == 0, err
    assert json.loads(out) == card, "the desktop alone leaves it free"


def test_c07_a_stranger_beside_our_idle_worker_keeps_new_calls_away(gpu_host: GpuHost) -> None:
    card = gpu_host.board.add_gpu()
    host = gpu_host.start().host
    process = host.popen(
        HEAD
        + """
span().result()
print("warm", flush=True)
until(base)
h = span()
reason(h, "FOREIGN_GPU_USE")
print("waits", flush=True)
h.result().unwrap()
""",
        str(host.project / "x"),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "warm\n"
    stranger = Stranger(gpu_host, card)
    wait_until(lambda: gpu_host.look()["gpus"][0]["foreign"], 10)
    (host.project / "x").touch()
    try:
        assert process.stdout.readline() == "waits\n", process.communicate()[1]
    finally:
        stranger.leave()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err


def test_c07_what_a_killed_worker_left_on_the_card_delays_the_next_lease(gpu_host: GpuHost) -> None:
    card = gpu_host.board.add_gpu()
    host = gpu_host.start().host
    process = host.popen(
        HEAD
        + """
@remote(gpu, max_retries=0)
def leave_a_child(path):
    import signal, subprocess
    child = subprocess.Popen(["sleep", "600"], start_new_session=True, env={})  # nothing marks it as ours
    Path(path + ".pid.new").write_text(str(child.pid)); os.rename(path + ".pid.new", path + ".pid")
    until(path)
    os.kill(os.getpid(), signal.SIGKILL)
out = leave_a_child(base).result()
assert out.state_reason == "WORKER_DIED", out
h = other_span()
reason(h, "FOREIGN_GPU_USE")
print("waits", flush=True)
h.result().unwrap()
""",
        str(host.project / "x"),
    )
    pid_file = host.project / "x.pid"
    wait_until(pid_file.exists, 20)
    pid = int(pid_file.read_text())
    try:
        gpu_host.board.add_process(card, pid, GIB)
        gpu_host.board.write()
        (host.project / "x").touch()
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n", process.communicate()[1]
    finally:
        os.kill(pid, 9)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err


def test_c07_a_hung_driver_lends_nothing_new_and_stops_nothing(gpu_host: GpuHost) -> None:
    gpu_host.board.add_gpu()
    gpu_host.board.add_gpu()
    host = gpu_host.start().host
    process = host.popen(
        HEAD
        + """
cpu = CpuLiveServerless(name="cpu")
@remote(cpu)
def plain(): return 1
running = hold(base)
until(base + ".began")
print("runs", flush=True)
until(base + ".hung")
h = other_span()
reason(h, "WAITING_GPU")
assert plain().result().output == 1
Path(base).touch()
assert running.result().output
assert not h.done()
print("waits", flush=True)
h.result().unwrap()
""",
        str(host.project / "x"),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "runs\n", process.communicate()[1]
    gpu_host.board.set_hang()
    gpu_host.board.write()
    wait_until(lambda: "did not answer" in gpu_host.look()["problem"], 10)
    (host.project / "x.hung").touch()
    try:
        assert process.stdout.readline() == "waits\n", process.communicate()[1]
    finally:
        gpu_host.board.clear_faults()
        gpu_host.board.write()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err


def test_c07_a_lost_card_is_not_lent_and_its_idle_worker_not_used(gpu_host: GpuHost) -> None:
    first, second = gpu_host.board.add_gpu(), gpu_host.board.add_gpu()
    host = gpu_host.start().host
    process = host.popen(
        HEAD + "print(json.dumps(span().result().output[2]), flush=True); until(base); time.sleep(1); print(json.dumps([h.result().output[2] for h in [span(), span()]]))",  # facts are as old as poll_seconds
        str(host.project / "x"),
    )
    assert process.stdout is not None
    used = json.loads(process.stdout.readline())
    gpu_host.board.set_fault(Fault.GPU_IS_LOST, uuid=used)
    gpu_host.board.write()
    (host.project / "x").touch()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert json.loads(out) == [second if used == first else first] * 2


def test_c07_a_host_without_gpus_runs_cpu_functions_and_refuses_gpu_ones(gpu_host: GpuHost) -> None:
    found = run(
        gpu_host.start().host,
        """
cpu = CpuLiveServerless(name="cpu")
@remote(cpu)
def plain(): return 1
one = plain().result().output
try: span().result()
except NoMatchingGPU as error: print(json.dumps([one, str(error)]))
""",
    )
    assert found[0] == 1
    assert "no NVIDIA GPU" in found[1]


def test_f30_a_driver_older_than_the_least_cuda_refuses_at_once_and_an_upgraded_one_serves(gpu_host: GpuHost) -> None:
    gpu_host.board.add_gpu()
    gpu_host.board.set_cuda(12, 2)
    host = gpu_host.start().host
    script = """
new, old = LiveServerless(name="new", minCudaVersion="12.4"), LiveServerless(name="old", minCudaVersion="12.1")
@remote(new, max_retries=0)
def on_new(): return "new"
@remote(old, max_retries=0)
def on_old(): return "old"
try: first = on_new().result().output
except NoMatchingGPU as error: first = str(error)
print(json.dumps([first, on_old().result().output]))
"""
    refused, served = run(host, script)
    assert "it needs CUDA 12.4, this driver supports 12.2; upgrade the driver or lower minCudaVersion" in refused
    assert served == "old"
    gpu_host.board.set_cuda(12, 4)
    gpu_host.board.write()
    time.sleep(0.5)  # facts are as old as poll_seconds
    gpu_host.look()
    assert run(host, script) == ["new", "old"]


def test_c07_a_driver_that_is_loaded_later_is_found(gpu_host: GpuHost) -> None:
    host = gpu_host.start().host
    uuid = gpu_host.board.add_gpu()
    gpu_host.board.write()
    found = run(
        host,
        """
end = time.time() + 20
while time.time() < end:
    try: print(json.dumps(span().result().output[2])); break
    except NoMatchingGPU: time.sleep(0.1)
""",
    )
    assert found == uuid


def test_c07_a_minimum_of_workers_is_kept_only_while_nobody_else_needs_the_card(gpu_host: GpuHost) -> None:
    gpu_host.board.add_gpu()
    found = run(
        gpu_host.start().host,
        """
kept = LiveServerless(name="kept", workersMin=1, workersMax=1, idleTimeout=0.3)
fleeting = LiveServerless(name="fleeting", idleTimeout=0.3)
@remote(kept)
def warm(): return os.getpid()
@remote(fleeting)
def cold(): return os.getpid()
pids = [warm().result().output]
time.sleep(1.0)  # longer than idleTimeout: that is the subject
pids.append(warm().result().output)
pids.append(cold().result().output)
time.sleep(1.0)
print(json.dumps([pids[0] == pids[1], pids[1] == pids[2], warm().result().status]))
""",
    )
    assert found == [True, False, "COMPLETED"]


def test_c07_a_wide_job_is_not_passed_for_ever_by_narrow_ones(gpu_host: GpuHost) -> None:
    gpu_host.board.add_gpu()
    gpu_host.board.add_gpu()
    found = run(
        gpu_host.start().host,
        """
both = LiveServerless(name="both", gpuCount=2)
@remote(both)
def wide(): return os.environ["CUDA_VISIBLE_DEVICES"].split(",")
first = [span(0.2), span(0.5)]
h = wide()
rest = [other_span(0.1) for _ in range(4)]
out = h.result()
print(json.dumps([len(set(out.output)), sorted(out.gpu) == sorted(out.output), all(r.result().output for r in rest)]))
""",
    )
    assert found == [2, True, True]


def test_f29_a_nested_call_that_only_its_callers_card_can_serve_runs_inside_it(gpu_host: GpuHost) -> None:
    uuid = gpu_host.board.add_gpu()
    found = run(
        gpu_host.start().host,
        """
@remote(gpu, max_retries=0)
def child(n): return [os.getpid(), n]
@remote(gpu, max_retries=0)
def parent(n): return [os.getpid(), child(n).result().unwrap()]
@remote(gpu, max_retries=0)
async def aparent(n): return [os.getpid(), (await child(n)).unwrap()]
@remote(gpu, max_retries=0)
async def achild(n): return [os.getpid(), n]
@remote(gpu, max_retries=0)
async def gathering(n): return [os.getpid(), [o.output for o in await asyncio.gather(*(achild(i) for i in range(n)))]]
handles = [parent(1), parent(2), aparent(3)]  # each waits behind the others in the same queue
outs = [h.result() for h in handles]
many = gathering(3).result()
print(json.dumps([[o.output for o in outs], [list(o.gpu) for o in outs], many.output, [o.error for o in (*outs, many)]]))
""",
    )
    outputs, cards, many, errors = found
    assert errors == [None] * 4
    assert all(output[0] == output[1][0] for output in outputs), "in the same process"
    assert [output[1][1] for output in outputs] == [1, 2, 3]
    assert cards == [[uuid]] * 3
    assert many[1] == [[many[0], n] for n in range(3)]


def test_f29_a_nested_call_with_the_same_dependencies_runs_inside_its_caller_too(gpu_host: GpuHost, tmp_path: Path) -> None:
    make_wheel(tmp_path, "tinydep", "1.0", {"tinydep": "x = 5\n"})
    settings = gpu_host.host.config.read_text(encoding="utf-8")
    gpu_host.host.config.write_text(f'{settings}[environments]\nwheel_folders = ["{tmp_path}"]\noffline = true\n', encoding="utf-8")
    gpu_host.board.add_gpu()
    found = run(
        gpu_host.start().host,
        """
@remote(gpu, dependencies=["tinydep"], max_retries=0)
def child():
    import tinydep
    return [os.getpid(), tinydep.x]
@remote(gpu, dependencies=["tinydep"], max_retries=0)
def parent(): return [os.getpid(), child().result().unwrap()]
out = parent().result()
print(json.dumps([out.output, out.error]))
""",
    )
    (outer, (inner, value)), error = found
    assert (error, outer == inner, value) == (None, True, 5)


def test_f29_a_nested_call_of_another_pool_is_refused_and_the_chain_is_named(gpu_host: GpuHost) -> None:
    gpu_host.board.add_gpu()
    found = run(
        gpu_host.start().host,
        """
@remote(other, max_retries=0)
def child(): return 1
@remote(gpu, max_retries=0)
def parent():
    out = child().result()
    return [out.state_reason, out.error, out.id, str(out.status)]
@remote(gpu, max_retries=0)
async def aparent():
    out = await child()
    return [out.state_reason, out.error, out.id, str(out.status)]
@remote(gpu, max_retries=3)
def raising(): return child().result().unwrap()
outs = [parent().result(), aparent().result()]
failed = raising().result()
print(json.dumps([[[o.id, *o.output] for o in outs], [type(failed.exception).__name__, failed.attempts], span().result().error]))
""",
    )
    for parent, reason, error, child, status in found[0]:
        assert (reason, status) == ("WOULD_DEADLOCK", "FAILED")
        assert f"{parent} > {child}" in error
    assert found[1] == ["WouldDeadlock", 1]
    assert found[2] is None, "the card is of use afterwards"


def test_f29_two_callers_that_wait_for_each_others_cards_do_not_deadlock(gpu_host: GpuHost) -> None:
    gpu_host.board.add_gpu("NVIDIA GeForce RTX 3090")
    gpu_host.board.add_gpu("NVIDIA RTX A6000", memory_bytes=48 * GIB)
    found = run(
        gpu_host.start().host,
        """
small = LiveServerless(name="small", gpus=GpuType.NVIDIA_GEFORCE_RTX_3090)
large = LiveServerless(name="large", gpus=GpuType.NVIDIA_RTX_A6000)
@remote(small, max_retries=0)
def on_small(): return "small"
@remote(large, max_retries=0)
def on_large(): return "large"
@remote(small, max_retries=0)
def from_small(mine, yours):
    Path(mine).touch(); until(yours)
    out = on_large().result()
    return [out.output, out.state_reason]
@remote(large, max_retries=0)
def from_large(mine, yours):
    Path(mine).touch(); until(yours)
    out = on_small().result()
    return [out.output, out.state_reason]
a, b = base + "a", base + "b"
outs = [h.result() for h in [from_small(a, b), from_large(b, a)]]
print(json.dumps(sorted(o.output[1] for o in outs)))
""",
    )
    assert found == ["", "WOULD_DEADLOCK"], "one is refused, the other is served"


def test_f29_a_nested_call_waits_for_a_card_whose_holder_goes_on_by_itself(gpu_host: GpuHost) -> None:
    gpu_host.board.add_gpu()
    found = run(
        gpu_host.start().host,
        """
cpu = CpuLiveServerless(name="cpu")
@remote(cpu)
def slow(path): until(path); return 1
@remote(gpu, max_retries=0)
def holder(path): Path(path + ".began").touch(); return slow(path).result().unwrap()
@remote(cpu, max_retries=0)
def caller(): return span().result().unwrap()[2]
first = holder(base)
until(base + ".began")
second = caller()
time.sleep(0.5)  # long enough to be refused, if that were going to happen
refused = second.done()
Path(base).touch()
print(json.dumps([refused, first.result().output, second.result().error]))
""",
    )
    assert found == [False, 1, None]


def test_c07_devices_are_named_by_uuid_in_the_status(gpu_host: GpuHost) -> None:
    uuid = gpu_host.board.add_gpu()
    host = gpu_host.start().host
    process = host.popen(HEAD + "hold(base).result().unwrap()", str(host.project / "x"))
    wait_until((host.project / "x.began").exists, 20)
    (shown,) = gpu_host.look()["gpus"]
    (host.project / "x").touch()
    process.communicate(timeout=20)
    assert (shown["uuid"], shown["free"]) == (uuid, False)


def test_c07_a_call_that_comes_while_an_idle_worker_dies_gets_another_one(gpu_host: GpuHost) -> None:
    """Its card is looked at before it is lent again, and nobody is given to the dead worker meanwhile."""
    gpu_host.board.add_gpu()
    found = run(
        gpu_host.start().host,
        """
@remote(gpu, max_retries=1)
def pid(): return os.getpid()
pids = []
for number in range(30):
    pids.append(pid().result(timeout=20).unwrap())
    os.kill(pids[-1], 9)
    time.sleep(number * 0.001)
print(json.dumps(len(set(pids))))
""",
    )
    assert found == 30
