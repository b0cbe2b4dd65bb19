"""What a client says about a function and about its own surroundings, checked before anything acts on it.

A *spec* is what all calls of one decorated function share; it is content like any other, sent once and
parsed once. A *context* is the caller's surroundings (environment, directory, path): it may hold secrets,
so it is a file that goes with the last job that needs it, and never a row.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from remoted.access import Identity
from remoted.errors import BadRequest
from remoted.lasting import in_force, lasting

_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Module = Annotated[str, Field(max_length=200, pattern=r"^\w+(\.\w+)*$")]
_Count = Annotated[int, Field(ge=0, le=1_000_000)]

#: Variables that make a process what it is; another value needs another worker (MECHANISMS 6).
KIND_VARIABLES = frozenset({"PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_PREFIX", "LANG", "LANGUAGE", "TZ"})
#: Ours to say, whatever the caller has: a nested call comes from a worker that has a value of its own.
_OURS = frozenset({"CUDA_VISIBLE_DEVICES"})
KIND_PREFIXES = ("PYTHON", "CUDA_", "NVIDIA_", "LC_", "OMP_", "MKL_", "OPENBLAS_")
#: Read by large packages while they are imported: a fork server, which imports before it knows its calls, must have these of
#: the callers too. Those of every package that the client guesses at (``codec/imports.py``), and of some others.
IMPORT_PREFIXES = ("NPY_", "NUMPY_", "SCIPY_", "PANDAS_", "SKLEARN_", "JOBLIB_", "TORCH", "PYTORCH_", "TRITON_", "KMP_", "HF_", "TRANSFORMERS_", "MPL", "XLA_", "JAX_", "TF_", "NUMBA_")

_Model = TypeVar("_Model", bound=BaseModel)


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FunctionSpec(_Checked):
    """Which code: its identity survives a restart of the script that did not edit it."""

    module: str = Field(max_length=500)
    qualname: str = Field(max_length=500)
    digest: str = Field(max_length=64)
    #: Large installed modules that it will import: hints for a fork server, names for nobody else.
    imports: tuple[_Module, ...] = Field(default=(), max_length=32)
    #: With ``max_concurrency``: its body is not async and holds the main thread of its worker until it returns.
    blocks: bool = False


class VolumeSpec(_Checked):
    id: _Name
    name: _Name | None
    mount_path: Annotated[str, Field(max_length=500)] | None


class PoolSpec(_Checked):
    """The resource config, as ``ResourceConfig.to_wire`` of the client writes it."""

    class_: str = Field(alias="class", max_length=80)
    name: _Name
    load_balanced: bool
    gpu: bool
    workers_min: _Count
    workers_max: Annotated[int, Field(ge=1, le=10_000)]
    idle_timeout_seconds: Annotated[float, Field(gt=0)] | None
    gpus: tuple[_Name, ...] = Field(max_length=64)
    gpu_count: Annotated[int, Field(ge=1, le=64)] | None
    gpu_memory_bytes: Annotated[int, Field(gt=0)] | None
    cpus: Annotated[float, Field(gt=0)] | None
    memory_bytes: Annotated[int, Field(gt=0)] | None
    volume: VolumeSpec | None
    image: str | None
    isolation: str
    ports: tuple[int, ...]
    execution_timeout_seconds: Annotated[float, Field(gt=0)] | None
    cuda_min: str | None
    preload: tuple[_Module, ...] = Field(max_length=64)
    max_concurrency: Annotated[int, Field(ge=1, le=1000)]
    preemptible: bool
    keep_warm_seconds: Annotated[float, Field(ge=0)]
    isolated: bool
    scaler_delay_seconds: float | None


class JobSpec(_Checked):
    """Everything that all calls of one function share."""

    function: FunctionSpec
    pool: PoolSpec
    dependencies: tuple[str, ...] = Field(default=(), max_length=1000)
    system_dependencies: tuple[str, ...] = Field(default=(), max_length=1000)
    accelerate_downloads: bool = False
    max_retries: Annotated[int, Field(ge=0, le=1000)]
    timeout_seconds: Annotated[float, Field(gt=0)] | None
    python: tuple[int, int, int]
    #: Never one that goes with the next upgrade.
    executable: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(lasting)]
    stream: bool = False
    #: Where the script runs and what it imports from; used when a job is tried again from the command line.
    cwd: str = Field(default="/", max_length=4096)
    sys_path: tuple[str, ...] = Field(default=(), max_length=1000)
    #: Names of ``env=``; the values come with each call and are never here.
    declared: tuple[str, ...] = Field(default=(), max_length=1000)


class Options(_Checked):
    """What one call says beyond its function's spec."""

    name: str | None = Field(default=None, max_length=200)
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    detach: bool = False
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    max_retries: Annotated[int, Field(ge=0, le=1000)] | None = None


class LoggingSettings(_Checked):
    """How the caller's script has set up the root logger."""

    level: Annotated[int, Field(ge=0, le=1000)]
    format: Annotated[str, Field(max_length=10_000)] | None = None
    date_format: Annotated[str, Field(max_length=1000)] | None = None
    style: Literal["%", "{", "$"] = "%"
    stdout: bool = False


class Context(_Checked):
    """The caller's surroundings at the call."""

    environ: dict[str, str]
    declared: dict[str, str]
    cwd: str
    umask: Annotated[int, Field(ge=0, le=0o777)]
    sys_path: tuple[str, ...]
    argv: tuple[str, ...]
    #: The caller's soft RLIMIT_NOFILE.
    descriptors: Annotated[int, Field(ge=0, le=1 << 30)] = 1024
    logging: LoggingSettings | None = None
    #: Literals of ``env=`` that were taken out of module texts, by place.
    values: dict[str, str] = Field(default_factory=dict)

    def worker_variables(self) -> dict[str, str]:
        """The part of the environment that a process cannot change after its start, sorted."""
        chosen = {
            name: value
            for name, value in self.environ.items()
            if (name in KIND_VARIABLES or name.startswith(KIND_PREFIXES)) and name not in _OURS
        }
        return dict(sorted({**chosen, **self.declared}.items()))

    def import_variables(self) -> dict[str, str]:
        """What packages read at import beyond that."""
        return {name: value for name, value in self.environ.items() if name.startswith(IMPORT_PREFIXES)}


def parse_spec(data: bytes) -> JobSpec:
    return _parse(JobSpec, data, "the function's spec")


def parse_context(data: bytes) -> Context:
    return _parse(Context, data, "the call's context")


def parse_options(document: object) -> Options:
    try:
        return Options.model_validate(document)
    except ValidationError as error:
        raise BadRequest("BAD_OPTIONS", f"cannot use the call's options: {_problems(error)}") from None


def _parse(kind: type[_Model], data: bytes, what: str) -> _Model:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise BadRequest("BAD_SPEC", f"cannot read {what}: {_problems(error)}") from None


def _problems(error: ValidationError) -> str:
    """Where and what, never the value: it may be a secret."""
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_input=False)[:5])


def kind_id(key: bytes, spec: JobSpec, context: Context, gpus: tuple[str, ...], identity: Identity | None = None) -> str:
    """What a worker must be to run this call, and whose (T35); values of variables enter only through an HMAC with ``key``."""
    pool = spec.pool
    facts = [
        in_force(spec.executable),
        list(spec.python),
        context.worker_variables(),
        list(gpus),
        pool.gpu_count,
        sorted(spec.dependencies),
        pool.isolated,
        pool.isolation,
        pool.image,
        pool.memory_bytes,
        list(pool.preload),
        pool.max_concurrency,
        pool.volume.model_dump() if pool.volume else None,
        [identity.uid, identity.gid, identity.groups, identity.limits, identity.name, pool.cpus] if identity else None,
    ]
    return hmac.new(key, json.dumps(facts, sort_keys=True).encode(), hashlib.sha256).hexdigest()[:16]
