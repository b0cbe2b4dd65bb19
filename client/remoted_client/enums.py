"""The words a resource config is written in: GPUs, CPU instances, CUDA versions, data centres, kinds of endpoint.

Owns the names, what each one says about itself, and how it is read from what a script wrote. It never asks the machine:
which device serves a group is for the daemon to say. Every member is also a string, so `GpuGroup.ADA_24` and `"ADA_24"`
mean the same everywhere.
"""

from __future__ import annotations

from enum import Enum, EnumMeta

from remoted_client.suggest import bad_value, check_list, check_member, check_type, did_you_mean, wrong_type

TYPE_CHECKING = False  # as in `typing`, whose import alone would cost a tenth of our budget
if TYPE_CHECKING:
    from typing_extensions import Self

GIB = 1 << 30


class _Words(EnumMeta):
    """Says what a list has when it is asked for what it has not."""

    if not TYPE_CHECKING:  # before Python 3.12 members are found here, too

        def __getattr__(cls, name):
            members = cls.__dict__.get("_member_map_", {})
            if name in members:
                return members[name]
            if name.startswith("_"):
                raise AttributeError(name)
            hint = did_you_mean(name, members) or f"; it has {', '.join(members)}"
            raise AttributeError(f"{cls.__name__} has no member {name!r}{hint}", name=name, obj=cls)


class Word(str, Enum, metaclass=_Words):
    """A string from a closed list, found again by value or by member name, whatever the case.

    Example: `GpuGroup("ada_24") is GpuGroup.ADA_24`
    """

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def lookup(cls, text: str) -> Self | None:
        """Return the member that `text` names, or None."""
        wanted = text.strip().casefold().replace("_", "-")
        for member in cls:
            if wanted in (_plain(member.value), _plain(member.name)):
                return member
        return None

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        return cls.lookup(value) if isinstance(value, str) else None


def _plain(text: str) -> str:
    return text.casefold().replace("_", "-")


class GpuGroup(Word):
    """A class of GPUs by architecture and memory in GB, or any GPU.

    Example: `LiveServerless(name="train", gpus=[GpuGroup.ADA_24, GpuGroup.AMPERE_24])`
    """

    ANY = "ANY"
    AMPERE_16 = "AMPERE_16"
    AMPERE_24 = "AMPERE_24"
    AMPERE_48 = "AMPERE_48"
    AMPERE_80 = "AMPERE_80"
    ADA_24 = "ADA_24"
    ADA_32_PRO = "ADA_32_PRO"
    ADA_48_PRO = "ADA_48_PRO"
    ADA_80_PRO = "ADA_80_PRO"
    HOPPER_141 = "HOPPER_141"
    BLACKWELL_96 = "BLACKWELL_96"
    BLACKWELL_180 = "BLACKWELL_180"

    @classmethod
    def all(cls) -> list[GpuGroup]:
        """Return every group but ANY."""
        return [group for group in cls if group is not cls.ANY]


class GpuType(Word):
    """One model of GPU, by the exact name that the driver (NVML) gives it.

    Example: `LiveServerless(name="train", gpus=GpuType.NVIDIA_H200)`
    """

    ANY = "ANY"
    NVIDIA_GEFORCE_RTX_4090 = "NVIDIA GeForce RTX 4090"
    NVIDIA_GEFORCE_RTX_5090 = "NVIDIA GeForce RTX 5090"
    NVIDIA_RTX_6000_ADA_GENERATION = "NVIDIA RTX 6000 Ada Generation"
    NVIDIA_H100_80GB_HBM3 = "NVIDIA H100 80GB HBM3"
    NVIDIA_RTX_A4000 = "NVIDIA RTX A4000"
    NVIDIA_RTX_A4500 = "NVIDIA RTX A4500"
    NVIDIA_RTX_4000_ADA_GENERATION = "NVIDIA RTX 4000 Ada Generation"
    NVIDIA_RTX_2000_ADA_GENERATION = "NVIDIA RTX 2000 Ada Generation"
    NVIDIA_RTX_A5000 = "NVIDIA RTX A5000"
    NVIDIA_L4 = "NVIDIA L4"
    NVIDIA_GEFORCE_RTX_3090 = "NVIDIA GeForce RTX 3090"
    NVIDIA_A40 = "NVIDIA A40"
    NVIDIA_RTX_A6000 = "NVIDIA RTX A6000"
    NVIDIA_A100_80GB_PCIe = "NVIDIA A100 80GB PCIe"
    NVIDIA_A100_SXM4_80GB = "NVIDIA A100-SXM4-80GB"
    NVIDIA_H200 = "NVIDIA H200"
    NVIDIA_B200 = "NVIDIA B200"
    NVIDIA_RTX_PRO_6000_BLACKWELL_SERVER_EDITION = "NVIDIA RTX PRO 6000 Blackwell Server Edition"
    NVIDIA_RTX_PRO_6000_BLACKWELL_WORKSTATION_EDITION = "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"
    NVIDIA_RTX_PRO_6000_BLACKWELL_MAX_Q_WORKSTATION_EDITION = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
    # The SDK's list ends here; what follows also stands in laboratories.
    NVIDIA_H100_PCIe = "NVIDIA H100 PCIe"
    NVIDIA_H100_NVL = "NVIDIA H100 NVL"
    NVIDIA_H200_NVL = "NVIDIA H200 NVL"
    NVIDIA_L40 = "NVIDIA L40"
    NVIDIA_L40S = "NVIDIA L40S"
    NVIDIA_A10 = "NVIDIA A10"
    NVIDIA_A30 = "NVIDIA A30"
    NVIDIA_A100_PCIE_40GB = "NVIDIA A100-PCIE-40GB"
    NVIDIA_A100_SXM4_40GB = "NVIDIA A100-SXM4-40GB"
    NVIDIA_RTX_A2000 = "NVIDIA RTX A2000"
    NVIDIA_RTX_A2000_12GB = "NVIDIA RTX A2000 12GB"
    NVIDIA_RTX_5000_ADA_GENERATION = "NVIDIA RTX 5000 Ada Generation"
    NVIDIA_GEFORCE_RTX_5080 = "NVIDIA GeForce RTX 5080"
    NVIDIA_GEFORCE_RTX_5070_TI = "NVIDIA GeForce RTX 5070 Ti"
    NVIDIA_GEFORCE_RTX_4080_SUPER = "NVIDIA GeForce RTX 4080 SUPER"
    NVIDIA_GEFORCE_RTX_4080 = "NVIDIA GeForce RTX 4080"
    NVIDIA_GEFORCE_RTX_4070_TI = "NVIDIA GeForce RTX 4070 Ti"
    NVIDIA_GEFORCE_RTX_4070 = "NVIDIA GeForce RTX 4070"
    NVIDIA_GEFORCE_RTX_4060_TI = "NVIDIA GeForce RTX 4060 Ti"
    NVIDIA_GEFORCE_RTX_3090_TI = "NVIDIA GeForce RTX 3090 Ti"
    NVIDIA_GEFORCE_RTX_3080_TI = "NVIDIA GeForce RTX 3080 Ti"
    NVIDIA_GEFORCE_RTX_3080 = "NVIDIA GeForce RTX 3080"
    NVIDIA_GEFORCE_RTX_3070 = "NVIDIA GeForce RTX 3070"
    NVIDIA_GEFORCE_RTX_3060 = "NVIDIA GeForce RTX 3060"
    NVIDIA_GEFORCE_RTX_2080_TI = "NVIDIA GeForce RTX 2080 Ti"
    NVIDIA_GEFORCE_GTX_1080_TI = "NVIDIA GeForce GTX 1080 Ti"
    NVIDIA_TITAN_RTX = "NVIDIA TITAN RTX"
    NVIDIA_TITAN_V = "NVIDIA TITAN V"
    QUADRO_RTX_6000 = "Quadro RTX 6000"
    QUADRO_RTX_8000 = "Quadro RTX 8000"
    TESLA_T4 = "Tesla T4"
    TESLA_P100_PCIE_16GB = "Tesla P100-PCIE-16GB"
    TESLA_V100_PCIE_16GB = "Tesla V100-PCIE-16GB"
    TESLA_V100_PCIE_32GB = "Tesla V100-PCIE-32GB"
    TESLA_V100_SXM2_16GB = "Tesla V100-SXM2-16GB"
    TESLA_V100_SXM2_32GB = "Tesla V100-SXM2-32GB"

    @classmethod
    def all(cls) -> list[GpuType]:
        """Return every model but ANY."""
        return [model for model in cls if model is not cls.ANY]


# What the SDK's documents put in each group. Used only to spell out `gpuIds="ADA_80_PRO,-NVIDIA H100 PCIe"`; the daemon
# matches by architecture and memory as well, so that a card outside this list is reachable too.
GROUP_MODELS: dict[GpuGroup, tuple[GpuType, ...]] = {
    GpuGroup.AMPERE_16: (
        GpuType.NVIDIA_RTX_A4000,
        GpuType.NVIDIA_RTX_A4500,
        GpuType.NVIDIA_RTX_4000_ADA_GENERATION,
        GpuType.NVIDIA_RTX_2000_ADA_GENERATION,
    ),
    GpuGroup.AMPERE_24: (GpuType.NVIDIA_RTX_A5000, GpuType.NVIDIA_L4, GpuType.NVIDIA_GEFORCE_RTX_3090),
    GpuGroup.AMPERE_48: (GpuType.NVIDIA_A40, GpuType.NVIDIA_RTX_A6000),
    GpuGroup.AMPERE_80: (GpuType.NVIDIA_A100_80GB_PCIe, GpuType.NVIDIA_A100_SXM4_80GB),
    GpuGroup.ADA_24: (GpuType.NVIDIA_GEFORCE_RTX_4090,),
    GpuGroup.ADA_32_PRO: (GpuType.NVIDIA_GEFORCE_RTX_5090,),
    GpuGroup.ADA_48_PRO: (GpuType.NVIDIA_RTX_6000_ADA_GENERATION, GpuType.NVIDIA_L40, GpuType.NVIDIA_L40S),
    GpuGroup.ADA_80_PRO: (GpuType.NVIDIA_H100_80GB_HBM3, GpuType.NVIDIA_H100_PCIe, GpuType.NVIDIA_H100_NVL),
    GpuGroup.HOPPER_141: (GpuType.NVIDIA_H200,),
    GpuGroup.BLACKWELL_96: (
        GpuType.NVIDIA_RTX_PRO_6000_BLACKWELL_SERVER_EDITION,
        GpuType.NVIDIA_RTX_PRO_6000_BLACKWELL_WORKSTATION_EDITION,
        GpuType.NVIDIA_RTX_PRO_6000_BLACKWELL_MAX_Q_WORKSTATION_EDITION,
    ),
    GpuGroup.BLACKWELL_180: (GpuType.NVIDIA_B200,),
}

# How a driver's names begin: a card that nobody listed here may still be asked for by its exact name.
_MAKERS = ("NVIDIA ", "Tesla ", "Quadro ", "TITAN ", "GRID ")


def check_gpu(field: str, value: object) -> GpuGroup | GpuType | str:
    """Return the group or model that `value` is or names, or the exact device name of a model not listed above."""
    allowed = "a GpuGroup, a GpuType or the name of one, alone or in a list"
    if isinstance(value, (GpuGroup, GpuType)):
        return value
    if not isinstance(value, str):
        raise wrong_type(field, value, allowed)
    found = GpuGroup.lookup(value) or GpuType.lookup(value)
    if found is not None:
        return found
    if value.startswith(_MAKERS) and value.isprintable() and "," not in value and len(value) <= 96:
        return value
    known = [*(str(group) for group in GpuGroup), *(str(model) for model in GpuType)]
    part = value.strip().casefold()
    holding = [repr(name) for name in known if part and part in name.casefold()]
    if holding:
        raise bad_value(field, value, f"{allowed}; did you mean {' or '.join(holding)}?")
    hint = did_you_mean(value, known) or f"; the groups are {', '.join(map(str, GpuGroup))}, and a card goes by its driver's name, such as {str(GpuType.NVIDIA_L4)!r}"
    raise bad_value(field, value, allowed + hint)


def check_gpus(gpus: object, gpu_ids: object) -> tuple[GpuGroup | GpuType | str, ...]:
    """Return the GPUs asked for in either spelling, in order, repeats kept; any GPU where nothing was asked for."""
    if gpus is not None and gpu_ids not in (None, ""):
        raise ValueError("cannot set gpuIds: gpus is set as well; keep one of them")
    if gpu_ids not in (None, ""):
        return tuple(parse_gpu_ids(check_type("gpuIds", gpu_ids, str, "a str such as 'ADA_24,AMPERE_24'")))
    if gpus is None:
        return (GpuGroup.ANY,)
    allowed = "a GpuGroup, a GpuType or the name of one, alone or in a list"
    listed = tuple(check_gpu("gpus", gpu) for gpu in check_list("gpus", gpus, allowed))
    if not listed:
        raise bad_value("gpus", gpus, f"{allowed} of at least one, or leave it out for any GPU")
    return listed


def parse_gpu_ids(text: str) -> list[GpuGroup | GpuType | str]:
    """Return what the cloud's text form asks for; `-NAME` takes one model out of the groups beside it.

    Example: `parse_gpu_ids("AMPERE_48,-NVIDIA A40") == [GpuType.NVIDIA_RTX_A6000]`
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    barred = {check_gpu("gpuIds", part[1:]) for part in parts if part.startswith("-")}
    wanted = [check_gpu("gpuIds", part) for part in parts if not part.startswith("-")]
    held = {model for asked in wanted for model in (asked, *_models(asked))}
    if not barred <= held:
        raise bad_value("gpuIds", text, "only exclusions (-NAME) of models that a group in the list is known to hold")
    kept = [gpu for asked in wanted for gpu in _without(asked, barred)]
    if not kept:
        raise bad_value("gpuIds", text, "at least one GPU that is not excluded")
    return kept


def _without(asked: GpuGroup | GpuType | str, barred: set[GpuGroup | GpuType | str]) -> list[GpuGroup | GpuType | str]:
    models = _models(asked)
    if not barred.intersection((asked, *models)):
        return [asked]
    return [model for model in models if model not in barred and asked not in barred]


def _models(asked: GpuGroup | GpuType | str) -> tuple[GpuType, ...]:
    return GROUP_MODELS.get(asked, ()) if isinstance(asked, GpuGroup) else ()


class CpuInstanceType(Word):
    """A size of CPU worker: `<family>-<vCPUs>-<memory in GiB>`.

    Example: `CpuInstanceType.CPU3G_2_8.memory_bytes == 8 * 2**30`
    """

    CPU_2 = "cpu-2-2"
    CPU_4 = "cpu-4-4"
    CPU_8 = "cpu-8-8"
    CPU_16 = "cpu-16-16"
    CPU_32 = "cpu-32-32"
    CPU3G_1_4 = "cpu3g-1-4"
    CPU3G_2_8 = "cpu3g-2-8"
    CPU3G_4_16 = "cpu3g-4-16"
    CPU3G_8_32 = "cpu3g-8-32"
    CPU3C_1_2 = "cpu3c-1-2"
    CPU3C_2_4 = "cpu3c-2-4"
    CPU3C_4_8 = "cpu3c-4-8"
    CPU3C_8_16 = "cpu3c-8-16"
    CPU5C_1_2 = "cpu5c-1-2"
    CPU5C_2_4 = "cpu5c-2-4"
    CPU5C_4_8 = "cpu5c-4-8"
    CPU5C_8_16 = "cpu5c-8-16"

    @property
    def vcpus(self) -> int:
        """How many CPUs' worth of time a worker of this size may use."""
        return int(self.value.split("-")[1])

    @property
    def memory_bytes(self) -> int:
        """How much memory a worker of this size may use."""
        return int(self.value.split("-")[2]) * GIB


def check_sizes(value: object) -> tuple[CpuInstanceType, ...]:
    """Return the CPU sizes that `instanceIds` names."""
    listed = () if value is None else check_list("instanceIds", value, "a list of CpuInstanceType or 'cpu3g-2-8'")
    return tuple(check_member("instanceIds", size, CpuInstanceType) for size in listed)


class CudaVersion(Word):
    """A CUDA version that the driver must at least support.

    Example: `LiveServerless(name="train", minCudaVersion=CudaVersion.V12_4)`
    """

    V11_8 = "11.8"
    V12_0 = "12.0"
    V12_1 = "12.1"
    V12_2 = "12.2"
    V12_3 = "12.3"
    V12_4 = "12.4"
    V12_5 = "12.5"
    V12_6 = "12.6"
    V12_7 = "12.7"
    V12_8 = "12.8"
    V12_9 = "12.9"
    V13_0 = "13.0"

    @property
    def number(self) -> tuple[int, int]:
        """The version as numbers, which compare as versions do."""
        major, minor = self.value.split(".")
        return int(major), int(minor)


def check_cuda(least: object, versions: object, allowed: object) -> dict[str, object]:
    """Settle the three fields that name CUDA versions, and the version that the driver must at least support.

    A newer driver runs what was made for an older CUDA, so of a list only the oldest version matters.
    """
    floors = _check_versions("minCudaVersion", least)
    if len(floors) > 1:
        raise bad_value("minCudaVersion", least, "one version")
    listed = _check_versions("cudaVersions", versions)
    spelled = _check_versions("allowedCudaVersions", allowed)
    oldest = sorted((*listed, *spelled), key=lambda version: version.number)[:1]
    return {
        "minCudaVersion": floors[0] if floors else None,
        "cudaVersions": listed,
        "allowedCudaVersions": ",".join(map(str, spelled)),
        "_cuda_min": max((*oldest, *floors), key=lambda version: version.number, default=None),
    }


def _check_versions(field: str, value: object) -> tuple[CudaVersion, ...]:
    if value is None:
        return ()
    items = check_list(field, value, "a CudaVersion or a string such as '12.4', alone or in a list")
    parts = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
    return tuple(check_member(field, part, CudaVersion) for part in parts if part != "")


class DataCenter(Word):
    """A data centre of the cloud; accepted, and without effect on one workstation.

    Example: `DataCenter.from_string("eu_ro_1") is DataCenter.EU_RO_1`
    """

    US_CA_2 = "US-CA-2"
    US_IL_1 = "US-IL-1"
    US_KS_2 = "US-KS-2"
    US_MO_1 = "US-MO-1"
    US_MO_2 = "US-MO-2"
    US_NC_2 = "US-NC-2"
    US_NE_1 = "US-NE-1"
    US_WA_1 = "US-WA-1"
    EU_CZ_1 = "EU-CZ-1"
    EU_RO_1 = "EU-RO-1"
    EUR_NO_1 = "EUR-NO-1"

    @classmethod
    def from_string(cls, value: str) -> DataCenter:
        """Return the data centre `value` names, in any case, with `_` or `-`; ValueError for an unknown one."""
        found = cls.lookup(value)
        if found is None:
            known = ", ".join(center.value for center in cls)
            raise ValueError(f"cannot find a data centre: {value!r} is not one; give one of {known}")
        return found

    @classmethod
    def all(cls) -> list[DataCenter]:
        """Return every data centre."""
        return list(cls)


class ServerlessType(Word):
    """How calls reach a worker: through the durable queue, or straight to it."""

    QB = "QB"
    LB = "LB"


class ServerlessScalerType(Word):
    """What makes another worker start: how long the first job has waited, or how many are waiting."""

    QUEUE_DELAY = "QUEUE_DELAY"
    REQUEST_COUNT = "REQUEST_COUNT"
