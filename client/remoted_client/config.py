"""The eight resource configs of `@remote`: what the workers of a function are, how many, and how long they stay.

Owns the fields, their defaults and the checks between them; a config that exists is valid. It knows nothing of this
host: what the machine cannot serve is refused by the daemon. `to_wire` is what the daemon reads; the values of
environment variables are never part of it, of `repr` or of a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remoted_client.enums import (
    GIB,
    CpuInstanceType,
    CudaVersion,
    GpuGroup,
    GpuType,
    ServerlessScalerType,
    ServerlessType,
    check_cuda,
    check_gpus,
    check_sizes,
)
from remoted_client.resources import (
    Immutable,
    NetworkVolume,
    PodTemplate,
    check_container,
    check_template,
    check_volume,
)
from remoted_client.suggest import (
    bad_value,
    check_amount,
    check_bool,
    check_env,
    check_int,
    check_member,
    check_modules,
    check_name,
    refuse_unknown,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn, TypeAlias

    from remoted_client.enums import DataCenter

    Gpu: TypeAlias = "GpuGroup | GpuType | str"
    Fields: TypeAlias = "dict[str, object]"

DEFAULT_WORKERS_MAX = 3
# Server-side fields of the cloud's SDK: they say nothing about one workstation, so they are accepted in silence.
_BOOKKEEPING = frozenset({
    "workersPFBTarget", "flashEnvironmentId", "computeType", "hubRelease", "repo", "aiKey", "userId", "createdAt",
    "activeBuildid", "flashBootType", "spot", "price", "pricing", "bidPrice", "maxPrice",
})  # fmt: skip
_REFUSED = {
    "templateId": "a template is an object of the cloud's server; write podTemplate=PodTemplate(...) instead",
    "networkVolumes": "a config has one volume here; write networkVolume=NetworkVolume(...) instead",
    "python_version": "a worker runs the interpreter that runs your script; leave the field out, or set imageName",
}


if TYPE_CHECKING:
    _Named = type
else:

    class _Named(type):
        """Asks for the name in the words of the other fields, before Python asks in its own."""

        def __call__(cls, *args, **fields):
            if not args and "name" not in fields:
                raise TypeError(f"cannot make {cls.__name__}: it has no name; write {cls.__name__}(name='...'): functions whose configs have one name share workers")
            if len(args) > 1:
                raise TypeError(f"cannot make {cls.__name__}: only the name goes without a keyword; write the others as field=value")
            return super().__call__(*args, **fields)


class ResourceConfig(Immutable, metaclass=_Named):
    """What the workers of one name are: the base of the eight classes, which scripts use instead.

    Two functions on one config, or on two configs of one class and name, share its workers. A field given as None
    counts as left out, but `idleTimeout=None` leaves the time to the daemon. GB counts 2**30 bytes, times are seconds.

    Scaling: `workersMin`, `workersMax` (3, or `workersMin` if that is larger), `idleTimeout`, `keep_warm_seconds`,
    `scalerType` and `scalerValue` (start another worker once a job has waited that many seconds), `max_concurrency`.
    GPUs: `gpus`, `gpuIds`, `gpuCount`, `gpu_memory_gb` (shares a GPU), `cudaVersions`, `allowedCudaVersions`,
    `minCudaVersion`, `preemptible`. CPU: `cpuCount`, `instanceIds` (makes any class a CPU one).
    Around the code: `env`, `networkVolume` or `networkVolumeId`, `podTemplate` (also spelled `template`), `imageName`,
    `isolation`, `preload` (installed modules that are imported once, for all workers), `isolated`, `executionTimeoutMs`.
    Accepted without effect: `flashboot`, `locations`, `datacenter`.
    """

    is_gpu: bool = True
    is_load_balanced: bool = False
    _inert = frozenset({"flashboot", "locations", "datacenter"})

    name: str
    workersMin: int
    workersMax: int
    idleTimeout: int | float | None
    gpus: list[Gpu]
    gpuCount: int | None
    gpuIds: str
    gpu_memory_gb: int | float | None
    cpuCount: int
    instanceIds: list[CpuInstanceType] | None
    networkVolume: NetworkVolume | None
    networkVolumeId: str | None
    env: dict[str, str | None]
    podTemplate: PodTemplate | None
    template: PodTemplate | None
    imageName: str | None
    isolation: str
    executionTimeoutMs: int
    scalerType: ServerlessScalerType
    scalerValue: int
    cudaVersions: list[CudaVersion]
    allowedCudaVersions: str
    minCudaVersion: CudaVersion | None
    type: ServerlessType
    flashboot: bool
    locations: str | None
    datacenter: DataCenter | str | Sequence[DataCenter | str] | None
    preload: list[str]
    max_concurrency: int
    preemptible: bool
    keep_warm_seconds: int | float
    isolated: bool
    _cpus: float | None
    _memory_bytes: int | None
    _cuda_min: CudaVersion | None
    _scaler_delay: float | None

    def __init__(
        self,
        name: str,
        *,
        workersMin: int = 0,
        workersMax: int | None = None,
        idleTimeout: float | None = 300,
        gpus: Gpu | Sequence[Gpu] | None = None,
        gpuCount: int | None = None,
        gpuIds: str | None = None,
        gpu_memory_gb: float | None = None,
        cpuCount: int | CpuInstanceType | None = None,
        instanceIds: CpuInstanceType | str | Sequence[CpuInstanceType | str] | None = None,
        networkVolume: NetworkVolume | None = None,
        networkVolumeId: str | None = None,
        env: Mapping[str, str | None] | None = None,
        podTemplate: PodTemplate | None = None,
        template: PodTemplate | None = None,
        imageName: str | None = None,
        isolation: str | None = None,
        executionTimeoutMs: int = 0,
        scalerType: ServerlessScalerType | str | None = None,
        scalerValue: int | None = None,
        cudaVersions: CudaVersion | str | Sequence[CudaVersion | str] | None = None,
        allowedCudaVersions: str | None = None,
        minCudaVersion: CudaVersion | str | None = None,
        type: ServerlessType | str | None = None,  # noqa: A002 - the SDK's own name
        flashboot: bool = True,
        locations: str | None = None,
        datacenter: DataCenter | str | Sequence[DataCenter | str] | None = None,
        preload: str | Sequence[str] | None = None,
        max_concurrency: int = 1,
        preemptible: bool = False,
        keep_warm_seconds: float = 3600,
        isolated: bool = False,
        **unknown: NoReturn,
    ) -> None:
        given = {field: value for field, value in locals().items() if field not in ("self", "unknown")}
        self._settle(given, unknown)

    def _settle(self, given: Fields, unknown: Mapping[str, object]) -> None:
        defaults: Fields = ResourceConfig.__init__.__kwdefaults__ or {}
        unknown = {field: value for field, value in unknown.items() if field not in _BOOKKEEPING}
        refuse_unknown(self.__class__.__name__, unknown, ("name", *defaults), _REFUSED)
        for field, default in defaults.items():
            if given[field] is None and field != "idleTimeout":
                given[field] = default
        values = _checked(self.__class__, given)
        written = [field for field, value in given.items() if value is not None]
        shown = [field for field in written if field not in defaults or values[field] != defaults[field]]
        if given["idleTimeout"] is None:
            shown.append("idleTimeout")
        self._fill(values, shown)
        if self.instanceIds:
            self.__dict__["is_gpu"] = False

    @property
    def declared_env(self) -> dict[str, str | None]:
        """The variables a worker starts with: the template's, then the config's. None is the caller's own value.

        Example: `LiveServerless("a", env={"MODE": "x", "API_KEY": None}).declared_env["MODE"] == "x"`
        """
        inherited = self.podTemplate.env if self.podTemplate else {}
        return {**inherited, **self.env}

    def without_env(self) -> ResourceConfig:
        """Return the same config without variables; its values must not travel where code is stored."""
        clone: ResourceConfig = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone.__dict__["_values"] = {**self.__dict__["_values"], "env": {}, "podTemplate": None}
        return clone

    def to_wire(self) -> dict[str, object]:
        """Return what the daemon needs to know, ready for JSON. Environment variables travel apart from it.

        Example: `LiveServerless("a", gpus=GpuGroup.ADA_24).to_wire()["gpus"] == ["ADA_24"]`
        """
        return {
            "class": self.__class__.__name__,
            "name": self.name,
            "load_balanced": self.is_load_balanced,
            "gpu": self.is_gpu,
            "workers_min": self.workersMin,
            "workers_max": self.workersMax,
            "idle_timeout_seconds": None if self.idleTimeout is None else float(self.idleTimeout),
            "gpus": [str(gpu) for gpu in self.gpus],
            "gpu_count": self.gpuCount,
            "gpu_memory_bytes": _gib_to_bytes(self.gpu_memory_gb),
            "cpus": self._cpus,
            "memory_bytes": self._memory_bytes,
            "volume": self._volume_to_wire(),
            "image": self.imageName,
            "isolation": self.isolation,
            "ports": self.podTemplate.ports if self.podTemplate else [],
            "execution_timeout_seconds": self.executionTimeoutMs / 1000 or None,
            "cuda_min": str(self._cuda_min) if self._cuda_min and self.is_gpu else None,
            "preload": self.preload,
            "max_concurrency": self.max_concurrency,
            "preemptible": self.preemptible,
            "keep_warm_seconds": float(self.keep_warm_seconds),
            "isolated": self.isolated,
            "scaler_delay_seconds": self._scaler_delay,
        }

    def _volume_to_wire(self) -> dict[str, str | None] | None:
        # An id that was not made in this process travels alone: the daemon knows the rest, or refuses it.
        if self.networkVolumeId is None:
            return None
        volume = self.networkVolume
        name, mount_path = (volume.name, volume.mount_path) if volume else (None, None)
        return {"id": self.networkVolumeId, "name": name, "mount_path": mount_path}


class LiveServerless(ResourceConfig):
    """GPU workers behind the durable queue; a call gives a `JobOutput`.

    Example: `LiveServerless(name="inference", gpus=[GpuGroup.AMPERE_24], workersMax=3, idleTimeout=600)`
    """


class CpuLiveServerless(ResourceConfig):
    """CPU workers behind the durable queue; a call gives a `JobOutput`.

    Example: `CpuLiveServerless(name="clean", cpuCount=2)`
    """

    is_gpu = False


class ServerlessEndpoint(ResourceConfig):
    """The same as `LiveServerless`, under the name the SDK uses in production.

    Example: `ServerlessEndpoint(name="inference_prod", gpus=[GpuGroup.AMPERE_80], workersMin=1, workersMax=10)`
    """


class CpuServerlessEndpoint(ResourceConfig):
    """The same as `CpuLiveServerless`, under the name the SDK uses in production.

    Example: `CpuServerlessEndpoint(name="clean_prod", instanceIds=[CpuInstanceType.CPU3G_4_16])`
    """

    is_gpu = False


class LiveLoadBalancer(ResourceConfig):
    """GPU workers called directly, without a queue: a call returns the function's value or raises its exception.

    Example: `LiveLoadBalancer(name="predict", gpus=[GpuGroup.ADA_24], workersMin=1)`
    """

    is_load_balanced = True


class CpuLiveLoadBalancer(ResourceConfig):
    """CPU workers called directly, without a queue.

    Example: `CpuLiveLoadBalancer(name="lookup", workersMin=1)`
    """

    is_gpu = False
    is_load_balanced = True


class LoadBalancerSlsResource(ResourceConfig):
    """The same as `LiveLoadBalancer`, under the name the SDK uses in production.

    Example: `LoadBalancerSlsResource(name="predict_prod", gpus=[GpuGroup.HOPPER_141], workersMin=2)`
    """

    is_load_balanced = True


class CpuLoadBalancerSlsResource(ResourceConfig):
    """The same as `CpuLiveLoadBalancer`, under the name the SDK uses in production.

    Example: `CpuLoadBalancerSlsResource(name="lookup_prod", workersMin=2)`
    """

    is_gpu = False
    is_load_balanced = True


def _checked(kind: type[ResourceConfig], given: Fields) -> Fields:
    on_cpu = not kind.is_gpu or bool(given["instanceIds"])
    template = check_template(given["podTemplate"], given["template"])
    return {
        "name": check_name("name", given["name"]),
        **_check_scaling(given),
        **_check_scaler(kind, given),
        **(_check_no_gpus(kind, given) if on_cpu else _check_gpus(given)),
        **check_cuda(given["minCudaVersion"], given["cudaVersions"], given["allowedCudaVersions"]),
        **_check_cpus(given, template),
        **check_volume(given["networkVolume"], given["networkVolumeId"]),
        **check_container(given["imageName"], given["isolation"], template),
        "podTemplate": template,
        "template": template,
        **_check_ours(given),
        "env": check_env("env", {} if given["env"] is None else given["env"]),
        "executionTimeoutMs": check_int("executionTimeoutMs", given["executionTimeoutMs"], 0, 10**12),
        **{field: given[field] for field in ("flashboot", "locations", "datacenter")},
    }


def _check_scaling(given: Fields) -> Fields:
    low, high, idle = check_int("workersMin", given["workersMin"], 0), given["workersMax"], given["idleTimeout"]
    high = max(DEFAULT_WORKERS_MAX, low) if high is None else check_int("workersMax", high, 1)
    if low > high:
        raise ValueError(f"cannot set workersMin: {low} is above workersMax, {high}; raise workersMax or lower it")
    return {
        "workersMin": low,
        "workersMax": high,
        "idleTimeout": None if idle is None else check_amount("idleTimeout", idle),
    }


def _check_scaler(kind: type[ResourceConfig], given: Fields) -> Fields:
    """Settle how calls reach a worker, which the class decides, and what makes another worker start."""
    served = ServerlessType.LB if kind.is_load_balanced else ServerlessType.QB
    if given["type"] is not None and check_member("type", given["type"], ServerlessType) is not served:
        raise bad_value("type", given["type"], f"{served} or nothing: {kind.__name__} decides it, not the field")
    by_delay, by_count = ServerlessScalerType.QUEUE_DELAY, ServerlessScalerType.REQUEST_COUNT
    scaler = by_count if kind.is_load_balanced else by_delay
    if given["scalerType"] is not None:
        scaler = check_member("scalerType", given["scalerType"], ServerlessScalerType)
    if kind.is_load_balanced and scaler is by_delay:
        raise bad_value("scalerType", str(scaler), f"REQUEST_COUNT: {kind.__name__} has no queue to wait in")
    value = 4 if given["scalerValue"] is None else check_int("scalerValue", given["scalerValue"], 1)
    asked = given["scalerType"] is not None or given["scalerValue"] is not None
    delay = float(value) if asked and scaler is by_delay else None
    return {"type": served, "scalerType": scaler, "scalerValue": value, "_scaler_delay": delay}


def _check_no_gpus(kind: type[ResourceConfig], given: Fields) -> Fields:
    """Refuse GPU fields on a CPU class. On a GPU class with `instanceIds` they are dropped, as the cloud's SDK does."""
    for field in ("gpus", "gpuCount", "gpuIds", "gpu_memory_gb"):
        if given[field] and (not kind.is_gpu or field == "gpu_memory_gb"):
            why = "instanceIds asks for CPU workers" if kind.is_gpu else f"{kind.__name__} has CPU workers only"
            way_out = "drop instanceIds" if kind.is_gpu else "use a class without 'Cpu' in its name"
            raise ValueError(f"cannot set {field}: {why}; leave it out, or {way_out} for GPUs")
    return {"gpus": (), "gpuCount": None, "gpuIds": "", "gpu_memory_gb": None}


def _check_gpus(given: Fields) -> Fields:
    count, memory = given["gpuCount"], given["gpu_memory_gb"]
    gpus = check_gpus(given["gpus"], given["gpuIds"])
    return {
        "gpus": gpus,
        "gpuCount": None if count is None else check_int("gpuCount", count, 1, 64),
        "gpuIds": ",".join(dict.fromkeys(map(str, gpus))),
        "gpu_memory_gb": None if memory is None else check_amount("gpu_memory_gb", memory),
    }


def _check_cpus(given: Fields, template: PodTemplate | None) -> Fields:
    """Settle the limits: the config's CPUs before the template's, and a stated memory before that of a size."""
    count, sizes = given["cpuCount"], check_sizes(given["instanceIds"])
    if count is not None and sizes:
        raise ValueError("cannot set cpuCount: instanceIds is set as well; keep one of them")
    # Limits and not reservations: the largest size never keeps a worker from starting.
    largest = max(sizes, key=lambda size: (size.vcpus, size.memory_bytes), default=None)
    size = count if isinstance(count, CpuInstanceType) else largest
    vcpus = size.vcpus if size else None if count is None else check_int("cpuCount", count, 1, 4096)
    template_cpus = template.cpu_count if template else None
    cpus = vcpus if vcpus is not None else template_cpus
    memory = _gib_to_bytes(template.memory_gb) if template else None
    return {
        "cpuCount": 1 if vcpus is None else vcpus,
        "instanceIds": sizes or None,
        "_cpus": None if cpus is None else float(cpus),
        "_memory_bytes": size.memory_bytes if size and memory is None else memory,
    }


def _check_ours(given: Fields) -> Fields:
    return {
        "preload": check_modules("preload", given["preload"]),
        "max_concurrency": check_int("max_concurrency", given["max_concurrency"], 1),
        "preemptible": check_bool("preemptible", given["preemptible"]),
        "keep_warm_seconds": check_amount("keep_warm_seconds", given["keep_warm_seconds"], zero=True),
        "isolated": check_bool("isolated", given["isolated"]),
    }


def _gib_to_bytes(amount: int | float | None) -> int | None:
    return None if amount is None else max(1, int(amount * GIB))
