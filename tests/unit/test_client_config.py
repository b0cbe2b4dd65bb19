"""The configs as values: made once, compared by content, never showing a secret; and the words they are written in."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remoted_client import config as config_module
from remoted_client.config import CpuLiveServerless, LiveServerless, ResourceConfig, ServerlessEndpoint
from remoted_client.enums import (
    GROUP_MODELS,
    CpuInstanceType,
    CudaVersion,
    DataCenter,
    GpuGroup,
    GpuType,
    ServerlessScalerType,
    ServerlessType,
    parse_gpu_ids,
)
from remoted_client.resources import NetworkVolume, PodTemplate
from remoted_client.suggest import check_amount, check_env, check_int, check_name, closest, did_you_mean

CLIENT = Path(config_module.__file__).parent.parent
SECRET = "hunter2-do-not-print"


def test_configs_with_equal_content_are_equal_and_hash_alike() -> None:
    one = LiveServerless(name="a", gpus=["ADA_24"], env={"B": "2", "A": "1"})
    other = LiveServerless("a", gpus=GpuGroup.ADA_24, env={"A": "1", "B": "2"})

    assert one == other
    assert hash(one) == hash(other)
    assert {one: "found"}[other] == "found"


@pytest.mark.parametrize(
    "other",
    [
        LiveServerless("b"),
        LiveServerless("a", workersMax=4),
        LiveServerless("a", env={"A": "1"}),
        LiveServerless("a", cpuCount=1),
        ServerlessEndpoint("a"),
        "a",
    ],
)
def test_configs_that_mean_different_things_differ(other: object) -> None:
    assert LiveServerless("a") != other


def test_cloud_bookkeeping_does_not_make_two_configs_differ() -> None:
    plain = LiveServerless("a")
    decorated = LiveServerless("a", flashboot=False, locations="EU", datacenter=[DataCenter.EU_RO_1])

    assert plain == decorated
    assert hash(plain) == hash(decorated)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (LiveServerless("a"), "workersMax"),
        (LiveServerless("a"), "is_gpu"),
        (LiveServerless("a"), "no_such_field"),
        (NetworkVolume("v"), "mount_path"),
        (PodTemplate(memory_gb=1), "memory_gb"),
    ],
)
def test_a_value_cannot_be_changed_after_it_was_made(value: object, field: str) -> None:
    with pytest.raises(AttributeError, match=rf"cannot set {field}: .* does not change .* make a new"):
        setattr(value, field, 1)
    with pytest.raises(AttributeError, match=f"cannot delete {field}: "):
        delattr(value, field)


def test_editing_a_list_or_dict_that_was_read_or_passed_does_not_edit_the_config() -> None:
    gpus, env = [GpuGroup.ADA_24], {"A": "1"}
    config = LiveServerless("a", gpus=gpus, env=env)

    gpus.append(GpuGroup.ANY)
    env["B"] = "2"
    config.gpus.append(GpuGroup.ANY)
    config.env["C"] = "3"

    assert config.gpus == [GpuGroup.ADA_24]
    assert config.env == {"A": "1"}


def test_repr_shows_only_what_was_set_and_reads_like_the_call() -> None:
    config = LiveServerless("a", gpus=["ADA_24"], workersMin=0, workersMax=5, cpuCount=1, preload="torch")

    assert repr(config) == (
        "LiveServerless(name='a', workersMax=5, gpus=[GpuGroup.ADA_24], cpuCount=1, preload=['torch'])"
    )
    assert repr(CpuLiveServerless("a")) == "CpuLiveServerless(name='a')"
    assert repr(CpuLiveServerless("a", idleTimeout=None)) == "CpuLiveServerless(name='a', idleTimeout=None)"
    assert repr(NetworkVolume("v", "/data")) == "NetworkVolume(name='v', mount_path='/data')"


def test_no_text_form_shows_the_value_of_an_environment_variable() -> None:
    template = PodTemplate(env={"TOKEN": SECRET})
    config = LiveServerless("a", env={"API_KEY": SECRET, "MODE": None}, podTemplate=template)

    for text in (repr(config), str(config), f"{config}", repr(template), str(config.to_wire())):
        assert SECRET not in text
    assert "env={'API_KEY': ..., 'MODE': ...}" in repr(config)


@pytest.mark.parametrize(
    "env",
    [
        {"KEY": SECRET.encode()},
        {"KEY": SECRET + "\0"},
        {"": SECRET},
        {f"KEY={SECRET}": "x"},
        {1: SECRET},
        [SECRET],
        SECRET,
        {"KEY": [SECRET]},
    ],
)
def test_an_error_about_an_environment_names_the_variable_and_never_its_value(env: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="env") as caught:
        LiveServerless("a", env=env)

    assert SECRET not in str(caught.value)
    with pytest.raises((TypeError, ValueError), match="env") as caught:
        PodTemplate(env=env)
    assert SECRET not in str(caught.value)


def _copied(value: object) -> object:
    return copy.copy(value)


def _deeply_copied(value: object) -> object:
    return copy.deepcopy(value)


def _pickled(value: object) -> object:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [_copied, _deeply_copied, _pickled])
def test_a_config_survives_copying_and_pickling(copied: Callable[[object], object]) -> None:
    config = LiveServerless(
        "a", instanceIds=["cpu3g-2-8"], env={"A": "1"}, networkVolume=NetworkVolume("v"), template=PodTemplate(2)
    )

    twin: Any = copied(config)

    assert twin == config
    assert twin.to_wire() == config.to_wire()
    assert repr(twin) == repr(config)
    assert twin.is_gpu is False
    with pytest.raises(AttributeError, match="does not change"):
        twin.name = "b"


def test_a_missing_attribute_is_named_and_the_fields_are_listed_for_completion() -> None:
    config: Any = LiveServerless("a")

    with pytest.raises(AttributeError, match="LiveServerless has no attribute 'workerMax'") as caught:
        _ = config.workerMax

    assert caught.value.name == "workerMax"
    assert {"workersMax", "networkVolumeId", "declared_env", "to_wire"} <= set(dir(config))


def test_a_name_is_required() -> None:
    with pytest.raises(TypeError, match="name"):
        LiveServerless()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_every_field_of_the_constructor_can_be_read_back() -> None:
    fields = ResourceConfig.__init__.__kwdefaults__ or {}
    config = LiveServerless("a")

    assert len(fields) > 30
    assert all(hasattr(config, field) for field in ("name", *fields))


def test_importing_the_configs_loads_no_heavy_module() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(CLIENT)!r}); import remoted_client.config as c; c.LiveServerless('a');"
        "print(*sorted(set(sys.modules) & {'typing', 're', 'inspect', 'difflib', 'dataclasses', 'hashlib', 'json'}))"
    )

    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("word", "choices", "found"),
    [
        ("workers_max", ["workersMin", "workersMax"], "workersMax"),
        ("idletimeout", ["idleTimeout", "name"], "idleTimeout"),
        ("gpu", ["gpus", "env"], "gpus"),
        ("zzzzzz", ["gpus", "env"], None),
        ("anything", [], None),
    ],
)
def test_the_closest_choice_ignores_case_and_underscores(word: str, choices: list[str], found: str | None) -> None:
    assert closest(word, choices) == found
    assert did_you_mean(word, choices) == ("" if found is None else f"; did you mean {found!r}?")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, 0, -1])
def test_an_amount_that_nothing_could_count_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="cannot set field: "):
        check_amount("field", value)


def test_true_is_not_a_number_and_a_long_value_is_shown_cut() -> None:
    with pytest.raises(TypeError, match="cannot set field: its value is of type bool; give an int from 0"):
        check_int("field", True, 0)
    with pytest.raises(TypeError, match="of type bool"):
        check_amount("field", False)
    with pytest.raises(ValueError, match=r"x\.\.\. \(str\)") as caught:
        check_name("field", "x" * 5000)
    assert len(str(caught.value)) < 300


def test_an_environment_is_taken_from_any_mapping() -> None:
    import os

    assert check_env("env", os.environ) == dict(os.environ)


def test_members_are_found_by_value_or_name_in_any_case_and_print_as_their_value() -> None:
    assert GpuGroup("ada_24") is GpuGroup.ADA_24
    assert GpuGroup("any") is GpuGroup.ANY
    assert GpuType("nvidia_a40") is GpuType.NVIDIA_A40
    assert f"{GpuType.NVIDIA_A40}" == "NVIDIA A40"
    assert str(GpuGroup.ADA_24) == "ADA_24"
    with pytest.raises(ValueError, match="ADA_99"):
        GpuGroup("ADA_99")
    with pytest.raises(ValueError, match="7"):
        GpuGroup(7)


def test_all_leaves_out_any() -> None:
    assert len(GpuGroup.all()) == 11
    assert GpuGroup.ANY not in GpuGroup.all()
    assert GpuType.ANY not in GpuType.all()
    assert DataCenter.EU_RO_1 in DataCenter.all()


def test_every_group_but_any_knows_its_models_and_no_model_stands_in_two_groups() -> None:
    models = [model for group in GpuGroup.all() for model in GROUP_MODELS[group]]

    assert len(models) == len(set(models))


def test_the_text_form_of_gpus_takes_models_out_of_groups() -> None:
    assert parse_gpu_ids("ADA_24, AMPERE_80") == [GpuGroup.ADA_24, GpuGroup.AMPERE_80]
    assert parse_gpu_ids("AMPERE_48,-NVIDIA A40") == [GpuType.NVIDIA_RTX_A6000]
    assert parse_gpu_ids("NVIDIA H200,ADA_24") == [GpuType.NVIDIA_H200, GpuGroup.ADA_24]
    with pytest.raises(ValueError, match=r"cannot set gpuIds: .* that a group in the list is known to hold"):
        parse_gpu_ids("ANY,-NVIDIA L4")
    with pytest.raises(ValueError, match="at least one GPU"):
        parse_gpu_ids("ADA_24,-ADA_24")
    with pytest.raises(ValueError, match="at least one GPU"):
        parse_gpu_ids(" , ")


def test_cuda_versions_compare_as_numbers() -> None:
    assert max(CudaVersion, key=lambda version: version.number) is CudaVersion.V13_0
    assert min(CudaVersion, key=lambda version: version.number) is CudaVersion.V11_8
    assert len(CudaVersion) == 12


def test_the_two_kinds_of_endpoint_and_of_scaling_are_named() -> None:
    assert [kind.value for kind in ServerlessType] == ["QB", "LB"]
    assert [kind.value for kind in ServerlessScalerType] == ["QUEUE_DELAY", "REQUEST_COUNT"]
    assert [size.vcpus for size in CpuInstanceType][:5] == [2, 4, 8, 16, 32]
