"""SURFACE row F09: how a script asks for GPUs, and which cards of a host that buys what it finds serve it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.nvml import Board, build_library
from tests.fakes.nvml.board import GIB
from tests.harness import Host, host

#: Name, GiB, compute capability: a laboratory's mixture, with cards that no enum of the SDK names.
CARDS = (
    ("NVIDIA GeForce RTX 3090", 24, (8, 6)),
    ("NVIDIA GeForce RTX 3090", 24, (8, 6)),
    ("NVIDIA RTX A6000", 48, (8, 6)),
    ("NVIDIA L40S", 46, (8, 9)),
    ("Tesla T4", 15, (7, 5)),
    ("Tesla V100-SXM2-16GB", 16, (7, 0)),
    ("NVIDIA GeForce GTX 1080", 8, (6, 1)),
)

HEAD = """
import json, os
from remoted_client import *
from remoted_client import remote, LiveServerless, GpuGroup, GpuType
made = 0
def serve(**asked):
    "The UUIDs that one call sees, on a config of its own."
    global made
    made += 1
    @remote(LiveServerless(name=f"ask{made}", idleTimeout=0.1, **asked), max_retries=0)
    def visible(): return os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    out = visible().result()
    assert list(out.gpu) == out.output, out
    return out.output
def refuse(**asked):
    try: serve(**asked)
    except NoMatchingGPU as error: return str(error)
"""


class Lab:
    """The host, and the cards' names by UUID."""

    def __init__(self, on: Host, names: dict[str, str]) -> None:
        self._on, self._names = on, names

    def ask(self, expression: str) -> Any:
        return self._on.run(HEAD + f"print(json.dumps({expression}))\n").json

    def names(self, *asked: str) -> list[list[str]]:
        """The names of the cards that serve each of these."""
        return [[self._names[uuid] for uuid in found] for found in self.ask("[" + ", ".join(f"serve({one})" for one in asked) + "]")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    driver = build_library(tmp_path_factory.mktemp("driver"))
    with host(f'[gpu]\nnvml_library = "{driver}"\npoll_seconds = 0.2\n') as made:
        yield Lab(made, _plug_in(made))


def _plug_in(made: Host) -> dict[str, str]:
    board = Board(made.folder / "board")
    names = {board.add_gpu(name, memory_bytes=gib * GIB, compute_capability=capability): name for name, gib, capability in CARDS}
    board.write()
    made.start(REMOTED_FAKE_BOARD=str(Path(board.path)))
    return names


def test_f09_a_group_is_served_by_a_card_of_its_names_or_of_its_architecture_and_memory(lab: Lab) -> None:
    found = lab.names("gpus=[GpuGroup.AMPERE_24]", "gpus=GpuGroup.AMPERE_48", "gpus=['ADA_48_PRO']", "gpus=[GpuGroup.ADA_24]", "gpuIds='AMPERE_24'")
    assert found == [["NVIDIA GeForce RTX 3090"], ["NVIDIA RTX A6000"], ["NVIDIA L40S"], ["NVIDIA L40S"], ["NVIDIA GeForce RTX 3090"]]


def test_f09_a_type_is_exactly_that_card(lab: Lab) -> None:
    found = lab.names("gpus=GpuType.TESLA_T4", "gpus=GpuType.TESLA_V100_SXM2_16GB", "gpus='NVIDIA GeForce GTX 1080'", "gpus=[GpuType.NVIDIA_L40S]")
    assert found == [["Tesla T4"], ["Tesla V100-SXM2-16GB"], ["NVIDIA GeForce GTX 1080"], ["NVIDIA L40S"]]


def test_f09_a_repeated_entry_is_a_count_and_gpu_count_wins(lab: Lab) -> None:
    twice = ["NVIDIA GeForce RTX 3090"] * 2
    found = lab.names(
        "gpus=[GpuType.NVIDIA_GEFORCE_RTX_3090] * 2",
        "gpus=[GpuType.NVIDIA_GEFORCE_RTX_3090], gpuCount=2",
        "gpus=[GpuType.NVIDIA_GEFORCE_RTX_3090] * 3, gpuCount=2",
        "gpus=[GpuGroup.ANY] * 7",
    )
    assert found[:3] == [twice] * 3
    assert sorted(found[3]) == sorted(name for name, _, _ in CARDS)


def test_f09_different_entries_are_alternatives_in_order_of_preference(lab: Lab) -> None:
    found = lab.names("gpus=[GpuType.TESLA_T4, GpuType.NVIDIA_L40S]", "gpus=[GpuGroup.HOPPER_141, GpuType.NVIDIA_L40S, GpuGroup.ANY]")
    assert found == [["Tesla T4"], ["NVIDIA L40S"]]
    while_busy = lab.ask(
        """(lambda busy, free: [busy.result().output, free])(*(lambda h: (h, serve(gpus=[GpuType.TESLA_T4, GpuType.NVIDIA_L40S])))(
            remote(LiveServerless(name="busy", gpus=GpuType.TESLA_T4), max_retries=0)(lambda: __import__("time").sleep(1.5) or 1)()))"""
    )
    assert while_busy[0] == 1


def test_f09_any_takes_the_small_card_of_those_that_a_group_would_take(lab: Lab) -> None:
    assert lab.names("", "gpus=[GpuGroup.ANY]") == [["NVIDIA GeForce RTX 3090"]] * 2


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("gpus=[GpuGroup.HOPPER_141]", "1 x HOPPER_141"),
        ("gpus=[GpuGroup.AMPERE_80, GpuGroup.ADA_80_PRO]", "AMPERE_80 or ADA_80_PRO"),
        ("gpus=GpuType.NVIDIA_H200", "NVIDIA H200"),
        ("gpus=GpuType.NVIDIA_GEFORCE_RTX_3090, gpuCount=3", "ask for at most 2"),
    ],
)
def test_f09_what_this_host_can_never_serve_is_refused_at_once_and_the_host_is_named(lab: Lab, asked: str, told: str) -> None:
    message = lab.ask(f"refuse({asked})")
    assert told in message
    assert "2 x NVIDIA GeForce RTX 3090 (24 GiB)" in message


def test_f09_a_wrong_name_fails_at_the_config_with_a_suggestion(lab: Lab) -> None:
    with pytest.raises(AssertionError, match="AMPERE_24"):
        lab.ask("serve(gpus=['AMPERE_25'])")
