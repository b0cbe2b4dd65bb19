"""SURFACE rows F08 to F13 and F16: what a script may write in a resource config, and what the daemon is told of it."""

from __future__ import annotations

import json
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
from remoted_client.enums import (
    CpuInstanceType,
    CudaVersion,
    DataCenter,
    GpuGroup,
    GpuType,
    ServerlessScalerType,
    ServerlessType,
)
from remoted_client.resources import NetworkVolume, PodTemplate

GIB = 2**30
GPU_CLASSES: list[type[ResourceConfig]] = [
    LiveServerless,
    ServerlessEndpoint,
    LiveLoadBalancer,
    LoadBalancerSlsResource,
]
CPU_CLASSES: list[type[ResourceConfig]] = [
    CpuLiveServerless,
    CpuServerlessEndpoint,
    CpuLiveLoadBalancer,
    CpuLoadBalancerSlsResource,
]
BALANCED = {LiveLoadBalancer, LoadBalancerSlsResource, CpuLiveLoadBalancer, CpuLoadBalancerSlsResource}
WIRE_KEYS = set(
    "class name load_balanced gpu workers_min workers_max idle_timeout_seconds gpus gpu_count gpu_memory_bytes cpus"  # noqa: SIM905
    " memory_bytes volume image isolation ports execution_timeout_seconds cuda_min preload max_concurrency preemptible"
    " keep_warm_seconds isolated scaler_delay_seconds".split()
)


def made(kind: Any = LiveServerless, /, **fields: Any) -> ResourceConfig:
    """Make a config as a script would that no type checker has seen."""
    config: ResourceConfig = kind(**{"name": "a", **fields})
    return config


# F08: the classes and their fields


@pytest.mark.parametrize("kind", [*GPU_CLASSES, *CPU_CLASSES])
def test_f08_each_class_says_of_which_kind_it_is(kind: type[ResourceConfig]) -> None:
    config = kind("a")

    assert (config.is_gpu, kind.is_gpu) == (kind in GPU_CLASSES, kind in GPU_CLASSES)
    assert config.is_load_balanced is (kind in BALANCED)
    assert config.to_wire()["class"] == kind.__name__
    assert config.to_wire()["gpu"] is config.is_gpu
    assert config.to_wire()["load_balanced"] is config.is_load_balanced


@pytest.mark.parametrize("kind", [*GPU_CLASSES, *CPU_CLASSES])
def test_f08_the_defaults_are_those_of_the_document(kind: type[ResourceConfig]) -> None:
    config = kind(name="a")

    assert (config.workersMin, config.workersMax, config.idleTimeout) == (0, 3, 300)
    assert (config.cpuCount, config.networkVolumeId, config.env, config.podTemplate) == (1, None, {}, None)
    assert config.gpus == ([GpuGroup.ANY] if kind in GPU_CLASSES else [])
    assert config.type is (ServerlessType.LB if kind in BALANCED else ServerlessType.QB)


def test_f08_the_daemon_is_told_everything_but_the_environment() -> None:
    wire = LiveServerless("a", env={"A": "1"}).to_wire()

    assert set(wire) == WIRE_KEYS
    assert (
        json.loads(json.dumps(wire))
        == wire
        == {
            "class": "LiveServerless",
            "name": "a",
            "load_balanced": False,
            "gpu": True,
            "workers_min": 0,
            "workers_max": 3,
            "idle_timeout_seconds": 300.0,
            "gpus": ["ANY"],
            "gpu_count": None,
            "gpu_memory_bytes": None,
            "cpus": None,
            "memory_bytes": None,
            "volume": None,
            "image": None,
            "isolation": "subprocess",
            "ports": [],
            "execution_timeout_seconds": None,
            "cuda_min": None,
            "preload": [],
            "max_concurrency": 1,
            "preemptible": False,
            "keep_warm_seconds": 3600.0,
            "isolated": False,
            "scaler_delay_seconds": None,
        }
    )


def test_f08_two_functions_on_one_config_name_the_same_workers() -> None:
    one, other = LiveServerless("a", workersMax=1), LiveServerless("a", workersMax=2)

    assert (one.to_wire()["class"], one.to_wire()["name"]) == (other.to_wire()["class"], other.to_wire()["name"])


def test_f08_the_smallest_number_of_workers_may_not_exceed_the_largest() -> None:
    with pytest.raises(ValueError, match="cannot set workersMin: 5 is above workersMax, 3; raise workersMax"):
        made(workersMin=5, workersMax=3)


def test_f08_the_largest_number_of_workers_follows_the_smallest_where_it_was_left_out() -> None:
    assert made(workersMin=5).workersMax == 5
    assert made(workersMin=5, workersMax=None).workersMax == 5
    assert made(workersMin=2).workersMax == 3


@pytest.mark.parametrize("value", [0, -1, -0.5, float("nan"), float("inf")])
def test_f08_an_idle_timeout_is_above_zero(value: float) -> None:
    with pytest.raises(ValueError, match=r"cannot set idleTimeout: .* give a number above 0"):
        made(idleTimeout=value)


def test_f08_an_idle_timeout_may_be_a_fraction_longer_than_an_hour_or_the_daemons() -> None:
    assert made(idleTimeout=0.5).to_wire()["idle_timeout_seconds"] == 0.5
    assert made(idleTimeout=7200).to_wire()["idle_timeout_seconds"] == 7200.0
    assert made(idleTimeout=None).to_wire()["idle_timeout_seconds"] is None


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "a\\b", "..", ".", "a\nb", "a\0b", "a\x1b[0m", " a", "a ", "x" * 64, "\ud800"]
)
def test_f08_a_name_that_could_mislead_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot set name: "):
        made(name=name)


@pytest.mark.parametrize("name", ["02_ml_inference_gpu_worker", "my worker", "größe", "live-a-fb", "x" * 63, "a.b"])
def test_f08_a_name_is_kept_as_it_was_written(name: str) -> None:
    assert made(name=name).to_wire()["name"] == name


def test_f08_an_unknown_field_is_refused_with_a_suggestion() -> None:
    with pytest.raises(TypeError, match="cannot make LiveServerless: it has no field 'worker_max'; did you mean 'work"):
        made(worker_max=3)
    with pytest.raises(TypeError, match="did you mean 'idleTimeout'"):
        made(CpuLiveServerless, idle_timeout=3)
    with pytest.raises(TypeError, match=r"its fields are .*workersMax"):
        made(zzzzzzzz=3)


@pytest.mark.parametrize(
    ("field", "value", "type_name", "allowed"),
    [
        ("name", 3, "int", "a str"),
        ("name", None, "None", "a str"),
        ("workersMin", True, "bool", "an int from 0"),
        ("workersMax", "3", "str", "an int from 1"),
        ("workersMax", 2.0, "float", "an int from 1"),
        ("idleTimeout", "300", "str", "a number above 0"),
        ("idleTimeout", True, "bool", "a number above 0"),
        ("gpus", 3, "int", "a GpuGroup, a GpuType"),
        ("gpus", [24], "int", "a GpuGroup, a GpuType"),
        ("gpuCount", True, "bool", "an int from 1"),
        ("gpuIds", 3, "int", "a str"),
        ("cpuCount", 1.5, "float", "an int from 1"),
        ("instanceIds", 3, "int", "a list"),
        ("env", "A=1", "str", "a dict"),
        ("env", 0, "int", "a dict"),
        ("networkVolume", "models", "str", "a NetworkVolume"),
        ("networkVolumeId", 3, "int", "the id of a NetworkVolume"),
        ("podTemplate", {"memory_gb": 4}, "dict", "a PodTemplate"),
        ("template", 3, "int", "a PodTemplate"),
        ("imageName", 3, "int", "the name of an image"),
        ("executionTimeoutMs", 1.5, "float", "an int from 0"),
        ("scalerValue", "4", "str", "an int from 1"),
        ("scalerType", 3, "int", "QUEUE_DELAY, REQUEST_COUNT"),
        ("type", 3, "int", "QB, LB"),
        ("cudaVersions", 12.4, "float", "a CudaVersion"),
        ("minCudaVersion", 12.4, "float", "a CudaVersion"),
    ],
)
def test_f08_a_value_of_the_wrong_type_names_field_type_and_what_is_allowed(
    field: str, value: object, type_name: str, allowed: str
) -> None:
    with pytest.raises(TypeError, match=f"cannot set {field}: its value is of type") as caught:
        made(**{field: value})

    assert type_name in str(caught.value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"workersMin": -1},
        {"workersMax": 0},
        {"gpuCount": 0},
        {"cpuCount": 0},
        {"executionTimeoutMs": -1},
        {"scalerValue": 0},
        {"scalerType": "FASTEST"},
        {"type": "XX"},
        {"imageName": "--privileged"},
        {"imageName": "two words"},
        {"networkVolumeId": ""},
        {"networkVolumeId": "a\nb"},
        {"minCudaVersion": "99.9"},
        {"instanceIds": ["cpu9z-1-1"]},
    ],
)
def test_f08_a_value_out_of_range_names_field_and_type(fields: dict[str, object]) -> None:
    ((field, _),) = fields.items()

    with pytest.raises(ValueError, match=rf"cannot set {field}: .* \((int|str)\) is not allowed; give "):
        made(**fields)


def test_f08_none_counts_as_left_out() -> None:
    fields = ResourceConfig.__init__.__kwdefaults__ or {}

    assert made(**{field: None for field in fields if field != "idleTimeout"}) == LiveServerless("a")


def test_f08_cloud_bookkeeping_is_accepted_and_changes_nothing() -> None:
    config = made(flashboot=False, locations="EU-RO-1", datacenter=DataCenter.EU_RO_1, workersPFBTarget=0, spot=True)

    assert config.to_wire() == LiveServerless("a").to_wire()
    assert (config.flashboot, config.locations, config.datacenter) == (False, "EU-RO-1", DataCenter.EU_RO_1)
    assert made(price=0.25, hubRelease=None, flashBootType="FLASHBOOT") == LiveServerless("a")


@pytest.mark.parametrize(
    ("field", "way_out"),
    [("templateId", "podTemplate"), ("networkVolumes", "networkVolume="), ("python_version", "leave the field out")],
)
def test_f08_what_only_the_cloud_can_do_is_refused_with_the_way_out(field: str, way_out: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot set {field}: .*{way_out}"):
        made(**{field: "x"})
    assert made(**{field: None}) == LiveServerless("a")


def test_f08_an_execution_timeout_is_told_in_seconds() -> None:
    assert made(executionTimeoutMs=1500).to_wire()["execution_timeout_seconds"] == 1.5
    assert made(executionTimeoutMs=0).to_wire()["execution_timeout_seconds"] is None


def test_f08_a_queue_may_start_another_worker_after_a_delay() -> None:
    assert made(scalerType="QUEUE_DELAY", scalerValue=9).to_wire()["scaler_delay_seconds"] == 9.0
    assert made(scalerType=ServerlessScalerType.QUEUE_DELAY).to_wire()["scaler_delay_seconds"] == 4.0
    assert made(scalerValue=2).to_wire()["scaler_delay_seconds"] == 2.0
    assert made(scalerType="REQUEST_COUNT", scalerValue=2).to_wire()["scaler_delay_seconds"] is None
    assert made(LiveLoadBalancer, scalerValue=2).to_wire()["scaler_delay_seconds"] is None
    assert made(LiveLoadBalancer).scalerType is ServerlessScalerType.REQUEST_COUNT


def test_f08_a_load_balanced_class_has_no_queue_to_wait_in() -> None:
    with pytest.raises(ValueError, match=r"cannot set scalerType: .*REQUEST_COUNT: LiveLoadBalancer has no queue"):
        made(LiveLoadBalancer, scalerType="QUEUE_DELAY")


def test_f08_the_class_decides_the_type_and_the_field_may_only_agree() -> None:
    assert made(type="QB").type is ServerlessType.QB
    assert made(LiveLoadBalancer, type=ServerlessType.LB).type is ServerlessType.LB
    with pytest.raises(ValueError, match=r"cannot set type: .*LiveServerless decides it"):
        made(type="LB")


def test_f08_an_image_means_a_container_and_never_a_plain_process() -> None:
    wire = made(ServerlessEndpoint, imageName="python:3.11").to_wire()

    assert (wire["image"], wire["isolation"]) == ("python:3.11", "docker")
    assert made(imageName="").to_wire()["isolation"] == "subprocess"
    with pytest.raises(ValueError, match="cannot set imageName: isolation is 'subprocess'; write isolation='docker'"):
        made(imageName="python:3.11", isolation="subprocess")


# F09: GPUs


def test_f09_entries_keep_their_order_and_their_repeats() -> None:
    assert made(gpus=[GpuGroup.ADA_24, GpuGroup.AMPERE_80]).to_wire()["gpus"] == ["ADA_24", "AMPERE_80"]
    assert made(gpus=(GpuGroup.AMPERE_80,) * 2).to_wire()["gpus"] == ["AMPERE_80", "AMPERE_80"]


def test_f09_a_count_of_gpus_is_told_only_where_it_was_given() -> None:
    assert made(gpuCount=2).to_wire()["gpu_count"] == 2
    assert made(gpus=[GpuGroup.ADA_24] * 2).to_wire()["gpu_count"] is None


@pytest.mark.parametrize("gpus", [GpuGroup.ADA_24, "ADA_24", "ada_24", ["ADA_24"], (GpuGroup.ADA_24,)])
def test_f09_a_group_may_be_written_alone_in_a_list_or_as_text(gpus: object) -> None:
    assert made(gpus=gpus).gpus == [GpuGroup.ADA_24]


def test_f09_a_model_is_asked_for_by_its_exact_device_name() -> None:
    assert made(gpus=GpuType.NVIDIA_H200).to_wire()["gpus"] == ["NVIDIA H200"]
    assert made(gpus=["NVIDIA A100 80GB PCIe"]).gpus == [GpuType.NVIDIA_A100_80GB_PCIe]
    assert made(gpus="NVIDIA GeForce RTX 2060").to_wire()["gpus"] == ["NVIDIA GeForce RTX 2060"]


def test_f09_every_group_of_the_document_and_the_two_blackwells_exist() -> None:
    names = "ANY AMPERE_16 AMPERE_24 AMPERE_48 AMPERE_80 ADA_24 ADA_32_PRO ADA_48_PRO ADA_80_PRO HOPPER_141"

    for name in f"{names} BLACKWELL_96 BLACKWELL_180".split():
        assert GpuGroup[name].value == name
        assert made(gpus=[GpuGroup[name]]).to_wire()["gpus"] == [name]


def test_f09_any_is_one_word_in_every_spelling() -> None:
    for word in (GpuGroup.ANY, GpuType.ANY, "any", "ANY"):
        assert made(gpus=[word]).to_wire()["gpus"] == ["ANY"]


def test_f09_a_gpu_that_does_not_exist_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"cannot set gpus: 'AMPERE_8O' .*; did you mean 'AMPERE_80'"):
        made(gpus=["AMPERE_8O"])
    with pytest.raises(ValueError, match=r"cannot set gpus: .*leave it out for any GPU"):
        made(gpus=[])


def test_f09_the_text_form_of_the_cloud_means_the_same() -> None:
    assert made(gpuIds="ADA_24,AMPERE_24") == made(gpus=["ADA_24", "AMPERE_24"])
    assert made(gpuIds="ADA_80_PRO,-NVIDIA H100 PCIe").to_wire()["gpus"] == ["NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL"]
    assert made(gpus=["AMPERE_80", "AMPERE_80"]).gpuIds == "AMPERE_80"
    with pytest.raises(ValueError, match="cannot set gpuIds: gpus is set as well"):
        made(gpus=["ADA_24"], gpuIds="ADA_24")


@pytest.mark.parametrize("kind", CPU_CLASSES)
@pytest.mark.parametrize("fields", [{"gpus": ["ANY"]}, {"gpuCount": 1}, {"gpuIds": "ADA_24"}, {"gpu_memory_gb": 4}])
def test_f09_a_cpu_class_refuses_gpus(kind: type[ResourceConfig], fields: dict[str, object]) -> None:
    ((field, _),) = fields.items()

    with pytest.raises(ValueError, match=rf"cannot set {field}: {kind.__name__} has CPU workers only; leave it out"):
        made(kind, **fields)


# F10: CPUs


def test_f10_sizes_of_the_document_have_a_gib_for_each_cpu() -> None:
    for count in (2, 4, 8, 16, 32):
        size = CpuInstanceType[f"CPU_{count}"]
        assert (size.vcpus, size.memory_bytes) == (count, count * GIB)


@pytest.mark.parametrize(
    ("name", "vcpus", "gib"),
    [
        ("cpu3g-1-4", 1, 4),
        ("cpu3g-2-8", 2, 8),
        ("cpu3g-4-16", 4, 16),
        ("cpu3g-8-32", 8, 32),
        *((f"{family}-{cpus}-{2 * cpus}", cpus, 2 * cpus) for family in ("cpu3c", "cpu5c") for cpus in (1, 2, 4, 8)),
    ],
)
def test_f10_sizes_of_the_sdk_limit_cpus_and_memory(name: str, vcpus: int, gib: int) -> None:
    wire = made(CpuLiveServerless, instanceIds=[name]).to_wire()

    assert CpuInstanceType(name) is CpuInstanceType[name.upper().replace("-", "_")]
    assert (wire["cpus"], wire["memory_bytes"]) == (float(vcpus), gib * GIB)


def test_f10_a_count_of_cpus_is_told_only_where_it_was_given() -> None:
    assert made(CpuLiveServerless, cpuCount=1).to_wire()["cpus"] == 1.0
    assert made(CpuLiveServerless).to_wire()["cpus"] is None
    assert made(LiveServerless, cpuCount=8).to_wire()["cpus"] == 8.0


def test_f10_a_count_may_be_a_size_which_brings_its_memory() -> None:
    config = made(CpuLiveServerless, cpuCount=CpuInstanceType.CPU_4)

    assert config.cpuCount == 4
    assert (config.to_wire()["cpus"], config.to_wire()["memory_bytes"]) == (4.0, 4 * GIB)


def test_f10_of_several_sizes_the_largest_is_the_limit() -> None:
    config = made(CpuLiveServerless, instanceIds=["cpu3c-2-4", CpuInstanceType.CPU3G_2_8, "cpu3g-1-4"])

    assert config.to_wire()["memory_bytes"] == 8 * GIB
    assert config.instanceIds == [CpuInstanceType.CPU3C_2_4, CpuInstanceType.CPU3G_2_8, CpuInstanceType.CPU3G_1_4]


def test_f10_a_size_on_a_gpu_class_makes_its_workers_cpu_ones() -> None:
    config = made(LiveServerless, instanceIds="cpu3g-2-8", gpus=["ADA_24"], gpuCount=2, minCudaVersion="12.4")
    wire = config.to_wire()

    assert (config.is_gpu, LiveServerless.is_gpu, config.gpus) == (False, True, [])
    assert (wire["gpu"], wire["gpus"], wire["gpu_count"], wire["cuda_min"]) == (False, [], None, None)


def test_f10_a_count_and_a_size_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="cannot set cpuCount: instanceIds is set as well"):
        made(CpuLiveServerless, cpuCount=2, instanceIds=["cpu3g-2-8"])


# F11: templates


def test_f11_a_template_limits_the_worker_and_opens_ports() -> None:
    template = PodTemplate(memory_gb=40, cpu_count=8, expose_ports=["8080", "8081"])
    wire = made(podTemplate=template).to_wire()

    assert (wire["memory_bytes"], wire["cpus"], wire["ports"]) == (40 * GIB, 8.0, [8080, 8081])


def test_f11_template_is_another_word_for_pod_template() -> None:
    template = PodTemplate(memory_gb=1.5)

    assert made(template=template) == made(podTemplate=template)
    assert made(template=template, podTemplate=PodTemplate(memory_gb=1.5)).podTemplate == template
    assert made(podTemplate=template).template == template
    with pytest.raises(ValueError, match="cannot set template: podTemplate is set to another one"):
        made(template=template, podTemplate=PodTemplate(memory_gb=2))


def test_f11_the_config_goes_before_its_template_and_stated_memory_before_a_size() -> None:
    template = PodTemplate(memory_gb=3, cpu_count=8, imageName="from-template")
    wire = made(CpuLiveServerless, instanceIds=["cpu3g-2-8"], template=template, imageName="from-config").to_wire()

    assert (wire["cpus"], wire["memory_bytes"], wire["image"]) == (2.0, 3 * GIB, "from-config")
    assert made(template=template).to_wire()["isolation"] == "docker"
    assert made(template=template).imageName == "from-template"


@pytest.mark.parametrize("ports", ["8080/http,9090/tcp", ["8080", 9090], [8080, "9090/http", "8080"]])
def test_f11_ports_have_two_spellings(ports: Any) -> None:
    assert PodTemplate(ports=ports).ports == PodTemplate(expose_ports=ports).expose_ports == [8080, 9090]


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "", "000080801", "٣", 0, 70000])
def test_f11_a_port_that_does_not_exist_is_refused(port: Any) -> None:
    with pytest.raises(ValueError, match="cannot set expose_ports: "):
        PodTemplate(expose_ports=[port])


@pytest.mark.parametrize("field", ["dockerArgs", "startScript", "advancedStart", "containerRegistryAuthId"])
def test_f11_what_would_be_root_on_the_host_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"cannot set {field}: "):
        PodTemplate(**{field: "--privileged"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert PodTemplate(**{field: ""}) == PodTemplate()  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_f11_an_unknown_field_of_a_template_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        TypeError, match="cannot make PodTemplate: it has no field 'memoryGb'; did you mean 'memory_gb'"
    ):
        PodTemplate(memoryGb=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_f11_disk_name_and_config_of_a_template_have_no_effect() -> None:
    assert PodTemplate(name="t", containerDiskInGb=64, config={"a": 1}) == PodTemplate()


@pytest.mark.parametrize("fields", [{"memory_gb": 0}, {"memory_gb": float("nan")}, {"cpu_count": -1}])
def test_f11_a_limit_is_above_zero(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give a number above 0"):
        PodTemplate(**fields)


# F12: volumes


def test_f12_a_volume_has_its_id_at_once_and_the_same_one_everywhere() -> None:
    volume = NetworkVolume("model_storage", mount_path="/models")

    assert volume.id == NetworkVolume(name="model_storage").id == "vol-model-storage-" + volume.id[-12:]
    assert volume.id == "vol-model-storage-87a6e61a53bc"
    assert NetworkVolume("model-storage").id != volume.id
    assert NetworkVolume("model_storage", shared_with="lab").id != volume.id


def test_f12_a_volume_is_found_again_by_its_id() -> None:
    volume = NetworkVolume(name="storage_f12", mount_path="/models")

    by_id, by_volume = made(networkVolumeId=volume.id), made(networkVolume=volume)

    assert by_id == by_volume
    assert by_id.networkVolume == volume
    assert by_volume.networkVolumeId == volume.id
    assert by_id.to_wire()["volume"] == {"id": volume.id, "name": "storage_f12", "mount_path": "/models"}


def test_f12_an_id_from_elsewhere_is_passed_on_as_it_is() -> None:
    config = made(networkVolumeId="agv6w2qcg7")

    assert config.to_wire()["volume"] == {"id": "agv6w2qcg7", "name": None, "mount_path": None}
    assert config.networkVolume is None


def test_f12_a_volume_is_mounted_where_the_cloud_would_by_default() -> None:
    assert NetworkVolume("v").mount_path == "/runpod-volume"
    assert NetworkVolume("v", "/models/").mount_path == "/models"
    assert NetworkVolume("v", "/mnt/a/b").mount_path == "/mnt/a/b"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "//",
        "models",
        "./models",
        "/a/../b",
        "/a/./b",
        "/a//b",
        "//a",
        "/usr",
        "/etc/ssl",
        "/proc",
        "/home",
        "/tmp/",
        "/a\nb",
        "/a\0b",
        "/var/lib/x",
        "/dev/shm",
        "/a:ro",
        "/a,b",
        "/" + "x" * 300,
    ],
)
def test_f12_a_mount_path_that_would_hide_the_system_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"cannot set mount_path: .* give an absolute path"):
        NetworkVolume("v", path)


def test_f12_a_volume_takes_no_wrong_types_and_no_unknown_fields() -> None:
    with pytest.raises(TypeError, match="cannot set mount_path: its value is of type int"):
        NetworkVolume("v", 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="it has no field 'mountPath'; did you mean 'mount_path'"):
        NetworkVolume("v", mountPath="/models")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="cannot set name: "):
        NetworkVolume("../../etc")
    with pytest.raises(ValueError, match="cannot set shared_with: "):
        NetworkVolume("v", shared_with="")


def test_f12_size_and_place_of_a_volume_have_no_effect() -> None:
    assert NetworkVolume("v", size=100, dataCenterId=DataCenter.EU_RO_1) == NetworkVolume("v", datacenter="EU-RO-1")
    assert NetworkVolume("v", "/data") != NetworkVolume("v")


def test_f12_a_config_has_one_volume() -> None:
    volume = NetworkVolume("v")

    with pytest.raises(ValueError, match="cannot set networkVolumeId: networkVolume is set as well; keep one"):
        made(networkVolume=volume, networkVolumeId=volume.id)


# F13: CUDA and data centres


@pytest.mark.parametrize(
    ("fields", "least"),
    [
        ({}, None),
        ({"minCudaVersion": CudaVersion.V12_4}, "12.4"),
        ({"minCudaVersion": "11.8"}, "11.8"),
        ({"cudaVersions": [CudaVersion.V12_8, "12.1", CudaVersion.V13_0]}, "12.1"),
        ({"cudaVersions": "12.4"}, "12.4"),
        ({"allowedCudaVersions": "12.6,12.5"}, "12.5"),
        ({"allowedCudaVersions": ""}, None),
        ({"cudaVersions": ["12.1", "12.8"], "minCudaVersion": "12.4"}, "12.4"),
        ({"cudaVersions": ["12.8"], "minCudaVersion": "11.8"}, "12.8"),
    ],
)
def test_f13_the_driver_is_checked_only_where_the_script_asked(fields: dict[str, object], least: str | None) -> None:
    assert made(**fields).to_wire()["cuda_min"] == least


def test_f13_versions_read_back_as_members() -> None:
    config = made(cudaVersions=["12.4", "12.8"], minCudaVersion="12.4")

    assert config.cudaVersions == [CudaVersion.V12_4, CudaVersion.V12_8]
    assert config.minCudaVersion is CudaVersion.V12_4
    assert made().cudaVersions == []
    with pytest.raises(ValueError, match=r"cannot set minCudaVersion: .*one version"):
        made(minCudaVersion="12.4,12.5")


def test_f13_a_version_nobody_made_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot set cudaVersions: '12.99' .*did you mean '12.9'"):
        made(cudaVersions=["12.99"])


def test_f13_data_centres_are_found_in_any_spelling_and_change_nothing() -> None:
    for text in ("EU-RO-1", "eu-ro-1", "eu_ro_1", " EU_RO_1 "):
        assert DataCenter.from_string(text) is DataCenter.EU_RO_1
    assert made(datacenter=["EU-RO-1", "nowhere"]) == LiveServerless("a")
    with pytest.raises(ValueError, match="cannot find a data centre: 'nowhere' is not one; give one of US-CA-2"):
        DataCenter.from_string("nowhere")


# F16: environments


def test_f16_the_config_goes_before_its_template_and_none_is_the_callers_value() -> None:
    template = PodTemplate(env={"MODE": "template", "ONLY_TEMPLATE": "1"})
    config = made(podTemplate=template, env={"MODE": "config", "API_KEY": None})

    assert config.declared_env == {"MODE": "config", "ONLY_TEMPLATE": "1", "API_KEY": None}
    assert config.env == {"MODE": "config", "API_KEY": None}


def test_f16_a_template_takes_the_sdks_list_of_pairs() -> None:
    class Pair:
        key, value = "B", "2"

    assert PodTemplate(env=[{"key": "A", "value": "1"}, Pair()]).env == {"A": "1", "B": "2"}
    with pytest.raises(TypeError, match="cannot set env: "):
        PodTemplate(env=[{"name": "A", "value": "1"}])


def test_f16_no_value_is_part_of_what_the_daemon_stores() -> None:
    wire = made(env={"API_KEY": "hunter2"}, podTemplate=PodTemplate(env={"TOKEN": "hunter3"})).to_wire()

    assert "hunter" not in json.dumps(wire)
    assert "API_KEY" not in json.dumps(wire)
