"""C07, C09: a card stays with its worker over a restart of the daemon, and the worker is no stranger on it."""

from __future__ import annotations

import json
import signal

import psutil

from tests.fakes.nvml.board import GIB
from tests.fakes.service_manager import ServiceManager
from tests.gpu.conftest import GpuHost
from tests.gpu.test_pool import HEAD
from tests.harness import wait_until


def test_c07_a_warm_worker_keeps_its_card_over_a_restart(gpu_host: GpuHost) -> None:
    card, host = gpu_host.board.add_gpu(), gpu_host.host
    gpu_host.board.write()
    manager = ServiceManager(host, REMOTED_FAKE_BOARD=str(gpu_host.board.path))
    try:
        manager.start()
        gates = [host.project / name for name in ("first", "second")]
        client = host.popen(
            HEAD
            + """
@remote(gpu, max_retries=0)
def where(): return [os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]]
for gate in sys.argv[1:]:
    print(json.dumps(where().result().unwrap()), flush=True)
    until(gate)
print(json.dumps([where().result().unwrap(), other_span().result().unwrap()[2]]), flush=True)
""",
            *map(str, gates),
        )
        assert client.stdout is not None
        pid, seen = json.loads(client.stdout.readline())
        assert seen == card
        worker = psutil.Process(pid)
        gpu_host.board.add_process(card, pid, GIB)
        gpu_host.board.write()

        manager.restart(signal.SIGKILL)
        gates[0].touch()

        assert json.loads(client.stdout.readline()) == [pid, card], host.log()
        manager.restart(signal.SIGTERM)
        (shown,) = gpu_host.look()["gpus"]
        assert (shown["foreign"], shown["holder"]["worker"]) == ([], next(iter(manager.names()))), shown
        gates[1].touch()
        # For the other pool the idle worker ends, and its card is lent once it is empty.
        wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 20, host.log)
        gpu_host.board.remove_process(card, pid)
        gpu_host.board.write()
        out, err = client.communicate(timeout=30)
        assert client.returncode == 0, err + host.log()
        assert json.loads(out.splitlines()[-1]) == [[pid, card], card]
    finally:
        host.stop()
        manager.close()
