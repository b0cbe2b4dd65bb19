"""PyTorch tensors travel as arrays do (MECHANISMS 11). Needs a Python with PyTorch: name it in REMOTED_TEST_TORCH."""

from __future__ import annotations

import os

import pytest

from tests.harness import Host

PYTHON = os.environ.get("REMOTED_TEST_TORCH", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="NO PYTORCH HERE: name an interpreter that has it, and remoted's cloudpickle, in REMOTED_TEST_TORCH")

SCRIPT = """
import json, os, time
import torch
from remoted_client import remote, CpuLiveLoadBalancer, CpuLiveServerless
direct = CpuLiveLoadBalancer(name="direct", workersMax=1)
queue = CpuLiveServerless(name="queue", workersMax=1)
def same(x): return x
def twice(x):
    x *= 2  # in place: the caller must not see it
    return x
calls = [remote(direct)(same), lambda x: remote(queue)(same)(x)]
big = torch.arange(300_000, dtype=torch.float32).reshape(300, 1000)
samples = {
    "big": big, "small": torch.ones(3), "empty": torch.empty(0), "scalar": torch.tensor(7.5), "transposed": big.t(), "slice": big[10:20, ::3],
    "bfloat16": big.to(torch.bfloat16), "bool": big > 5, "complex": torch.complex(big, big), "grad": big.clone().requires_grad_(),
    "parameter": torch.nn.Parameter(big.clone()), "half": big.half(), "int64": big.long(),
}
wrong = []
back = remote(direct)(same)(samples).result()
stored = remote(queue)(same)(samples).result().unwrap()
for result in (back, stored):
    for name, x in samples.items():
        y = result[name]
        if type(y) is not type(x) or y.dtype != x.dtype or y.stride() != x.stride() or y.requires_grad != x.requires_grad or not torch.equal(x, y):
            wrong.append(name)
changed = remote(direct)(twice)(big).result()
wrong += ["in place"] if not torch.equal(changed, big * 2) or big[0, 1] != 1 else []
model = torch.nn.Linear(400, 400)
other = remote(direct)(same)(model).result()
wrong += ["module"] if not torch.equal(model(torch.ones(400)), other(torch.ones(400))) else []
back["big"] += 1  # the receiver's is writable
large = torch.ones(25_000_000)
times = []
for _ in range(9):
    began = time.perf_counter(); result = remote(direct)(same)(large).result(); times.append(time.perf_counter() - began); del result
print(f"100 MB there and back: {sorted(times)[4] * 1000:.0f} ms")
print(json.dumps(wrong))
"""


def test_f18_tensors_of_every_kind_come_back_as_they_were(shared_daemon: Host) -> None:
    process = shared_daemon.popen(SCRIPT, python=PYTHON, PYTHONWARNINGS="default")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err + shared_daemon.log()
    assert out.splitlines()[-1] == "[]", out
