"""SURFACE row F30, as far as a config goes: the fields that are ours and stand on any of the eight classes."""

from __future__ import annotations

from typing import Any

import pytest

from remoted_client.config import (
    CpuLiveLoadBalancer,
    CpuLiveServerless,
    CpuLoadBalancerSlsResource,
    CpuServerlessEndpoint,
    LiveLoadBalancer,
    LiveServerless,
    LoadBalancerSlsResource,
    ResourceConfig,
    ServerlessEndpoint,
)

GPU_CLASSES: list[type[ResourceConfig]] = [
    LiveServerless,
    ServerlessEndpoint,
    LiveLoadBalancer,
    LoadBalancerSlsResource,
]
ALL_CLASSES: list[type[ResourceConfig]] = [
    *GPU_CLASSES,
    CpuLiveServerless,
    CpuServerlessEndpoint,
    CpuLiveLoadBalancer,
    CpuLoadBalancerSlsResource,
]


def made(kind: Any = LiveServerless, /, **fields: Any) -> ResourceConfig:
    """Make a config as a script would that no type checker has seen."""
    config: ResourceConfig = kind(**{"name": "a", **fields})
    return config


@pytest.mark.parametrize("kind", ALL_CLASSES)
def test_f30_every_class_takes_our_fields(kind: type[ResourceConfig]) -> None:
    config = kind(
        "a",
        preload=["torch", "numpy.linalg"],
        max_concurrency=8,
        isolation="docker",
        preemptible=True,
        keep_warm_seconds=60,
        isolated=True,
    )
    wire = config.to_wire()

    assert (config.preload, wire["preload"]) == (["torch", "numpy.linalg"],) * 2
    assert (config.max_concurrency, wire["max_concurrency"]) == (8, 8)
    assert (config.isolation, wire["isolation"]) == ("docker", "docker")
    assert (config.preemptible, wire["preemptible"]) == (True, True)
    assert (config.keep_warm_seconds, wire["keep_warm_seconds"]) == (60, 60.0)
    assert (config.isolated, wire["isolated"]) == (True, True)


@pytest.mark.parametrize("kind", ALL_CLASSES)
def test_f30_left_out_they_are_cautious(kind: type[ResourceConfig]) -> None:
    config = kind("a")

    assert (config.gpu_memory_gb, config.preload, config.max_concurrency) == (None, [], 1)
    assert (config.isolation, config.preemptible, config.isolated) == ("subprocess", False, False)
    assert config.keep_warm_seconds == 3600


@pytest.mark.parametrize("kind", GPU_CLASSES)
def test_f30_gpu_memory_is_told_in_bytes(kind: type[ResourceConfig]) -> None:
    assert kind("a", gpu_memory_gb=1.5).to_wire()["gpu_memory_bytes"] == 3 * 2**29
    assert kind("a").to_wire()["gpu_memory_bytes"] is None


def test_f30_gpu_memory_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot set gpu_memory_gb: CpuLiveServerless has CPU workers only"):
        made(CpuLiveServerless, gpu_memory_gb=4)
    with pytest.raises(
        ValueError, match=r"cannot set gpu_memory_gb: instanceIds asks for CPU workers; .* drop instanceIds"
    ):
        made(gpu_memory_gb=4, instanceIds=["cpu3g-2-8"])


def test_f30_one_module_may_be_named_alone_and_each_counts_once() -> None:
    assert made(preload="torch").preload == ["torch"]
    assert made(preload=("torch", "numpy", "torch")).preload == ["torch", "numpy"]


def test_f30_workers_may_be_kept_warm_for_no_time_at_all() -> None:
    assert made(keep_warm_seconds=0).to_wire()["keep_warm_seconds"] == 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpu_memory_gb", "4"),
        ("gpu_memory_gb", True),
        ("preload", 3),
        ("preload", [3]),
        ("max_concurrency", 1.5),
        ("max_concurrency", True),
        ("isolation", 3),
        ("isolation", False),
        ("preemptible", 1),
        ("preemptible", "yes"),
        ("keep_warm_seconds", "60"),
        ("isolated", 0),
    ],
)
def test_f30_a_value_of_the_wrong_type_is_named(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"cannot set {field}: its value is of type .*; give "):
        made(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpu_memory_gb", 0),
        ("gpu_memory_gb", float("nan")),
        ("preload", ["not a module"]),
        ("preload", ["os; import sys"]),
        ("preload", [".relative"]),
        ("preload", [""]),
        ("max_concurrency", 0),
        ("isolation", "vm"),
        ("isolation", ""),
        ("keep_warm_seconds", -1),
        ("keep_warm_seconds", float("inf")),
    ],
)
def test_f30_a_value_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"cannot set {field}: .* \(\w+\) is not allowed; give "):
        made(**{field: value})
