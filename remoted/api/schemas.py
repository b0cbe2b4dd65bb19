"""The shapes of the API: what queries and bodies may say, and what answers hold. Keys are stable.

Times are Unix seconds; ids are shown as given. No shape has room for a payload, for values of variables or for
the interpreter path of a worker.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# -- asked -------------------------------------------------------------------------------------------------


class JobsQuery(_Shape):
    """``all``: finished ones too. Newest first; ``after`` is the last job of the page before, whole.

    ``status`` may name several, with commas; ``name`` is a shell pattern.
    """

    all: bool = False
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    status: Annotated[str, Field(pattern="^[A-Z_,]*$", max_length=100)] = ""
    pool: Annotated[str, Field(max_length=200)] = ""
    name: Annotated[str, Field(max_length=200)] = ""
    after: Annotated[str, Field(pattern="^[0-9a-f]{0,32}$")] = ""


class LogsQuery(_Shape):
    """``offset`` is one that was counted from records; ``follow`` waits for the job's end."""

    stream: Annotated[str, Field(pattern="^(stdout|stderr|both)$")] = "both"
    follow: bool = False
    offset: Annotated[int, Field(ge=0, le=1 << 62)] = 0


class WaitQuery(_Shape):
    timeout: Annotated[float, Field(ge=0, le=600)] = 30.0


def _no_nul(values: dict[str, str]) -> dict[str, str]:
    if any("\0" in name or "=" in name or not name or "\0" in value for name, value in values.items()):
        raise ValueError("a name or value cannot stand in an environment")
    return values


class RetryBody(_Shape):
    """The environment of whoever retries: the first call's went with it."""

    environ: Annotated[dict[str, str], AfterValidator(_no_nul)] = Field(default_factory=dict)


class NoBody(_Shape):
    """An empty body or ``{}``."""


class PruneBody(_Shape):
    unused_seconds: Annotated[float, Field(ge=0)] = 30 * 86_400.0


class DrainBody(_Shape):
    """``refuse``: new jobs are turned away instead of waiting. ``why`` is told to everybody."""

    refuse: bool = False
    why: Annotated[str, Field(max_length=200)] = ""


class StopBody(_Shape):
    """``now``: running jobs end too; else they go on, and the next daemon takes them over."""

    now: bool = False


# -- answered ----------------------------------------------------------------------------------------------


class Version(_Shape):
    version: str
    protocol: int
    api: int
    mode: str
    pid: int


class Job(_Shape):
    """One call. ``kind`` is queue (durable) or direct (load-balanced). ``position``: its place in its lane, 1 is next."""

    id: str
    kind: str
    name: str
    function: str
    pool: str
    status: str
    state_reason: str
    detail: str
    position: int | None
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    run_seconds: float
    attempts: int
    worker: str
    gpus: list[str]
    items: int
    result_size: int
    error: str
    error_type: str
    parent: str


class Attempt(_Shape):
    number: int
    worker: str
    pid: int
    gpus: list[str]
    started_at: float
    ended_at: float | None
    outcome: str
    message: str


class JobDetail(Job):
    traceback: str
    attempt_list: list[Attempt]


class Jobs(_Shape):
    jobs: list[Job]


class Asked(_Shape):
    """``cancelling`` is False when the job was over already."""

    id: str
    status: str
    cancelling: bool


class Retried(_Shape):
    id: str
    retry_of: str


class Holder(_Shape):
    worker: str
    pool: str
    uid: int
    jobs: list[str]


class ForeignProcess(_Shape):
    """A process outside the daemon. pid 0: somebody's whom this host does not show us."""

    pid: int
    uid: int | None
    command: str
    used_bytes: int | None


class Gpu(_Shape):
    uuid: str
    index: int
    minor: int | None
    name: str
    memory_bytes: int
    memory_used_bytes: int | None
    utilization_percent: int | None
    compute_capability: str
    free: bool
    holder: Holder | None
    foreign: list[ForeignProcess]


class Gpus(_Shape):
    """``problem`` says why nothing is known, if so. ``seen_at``: when NVML was asked."""

    gpus: list[Gpu]
    problem: str
    seen_at: float | None


class Memory(_Shape):
    """Bytes. ``shared``: copy-on-write with a fork server and its other workers; ``private``: freed if it ended."""

    resident: int
    shared: int
    private: int


class Worker(_Shape):
    """``idle_until``: when it ends if nobody needs it; None while it works.

    ``start``: forked (by ``fork_server``), plain (for ``start_reason``), or "" before it has started. ``memory`` is None for
    one that shares nothing, or that is too large to be measured in passing. ``leftovers``: its processes that no attempt has
    started that still runs; on a lease, those from before the lease.
    """

    id: str
    pool: str
    config_class: str
    state: str
    pid: int
    python: str
    gpus: list[str]
    started_at: float | None
    since: float
    idle_until: float | None
    calls_done: int
    running: list[str]
    start: str
    start_reason: str
    fork_server: str
    memory: Memory | None
    leftovers: int


class ForkServer(_Shape):
    """A process of yours that imports once and forks workers. ``state``: importing, ready or ending.

    ``preload``: what configs say; ``inferred``: what the code of functions lets expect.
    """

    id: str
    state: str
    pid: int
    preload: list[str]
    inferred: list[str]
    started_at: float
    used_at: float
    births: int
    memory: Memory | None


class Workers(_Shape):
    workers: list[Worker]
    fork_servers: list[ForkServer]


class Pool(_Shape):
    config_class: str
    name: str
    workers_min: int
    workers_max: int
    idle_timeout_seconds: float
    workers: int
    idle: int
    busy: int
    queued: int
    #: Its ``workers_min`` holds: until then, or as long as a process lives that uses its config.
    held: bool
    held_until: float | None


class Drain(_Shape):
    """Nothing new begins. ``refuses``: new jobs are turned away instead of waiting."""

    since: float
    refuses: bool
    why: str


class Drained(_Shape):
    """``running``: calls of everybody that go on. ``held``: jobs that wait for the end of the drain."""

    drain: Drain | None
    running: int
    held: int


class Daemon(_Shape):
    version: str
    mode: str
    pid: int
    uid: int
    started_at: float
    uptime_seconds: float
    #: By how much the event loop was late, at most, in the last minute.
    loop_lag_seconds: float
    #: It takes no new work: it is being stopped, or drained.
    draining: bool
    drain: Drain | None
    sockets: str


class OthersCall(_Shape):
    """All that one user may see of another's call. ``id``, ``worker`` and ``pid`` are for an administrator, and else empty."""

    uid: int
    name: str
    pool: str
    status: str
    gpus: list[str]
    submitted_at: float
    started_at: float | None
    id: str = ""
    worker: str = ""
    pid: int = 0


class Counts(_Shape):
    queued: int
    running: int
    workers: int
    completed: int
    cpus: float
    cpus_used: float


class Status(_Shape):
    """Everything at a glance. ``queue`` shows the first 200; ``counts.queued`` counts all. ``others``: as far as ``[privacy]`` lets see."""

    daemon: Daemon
    gpus: list[Gpu]
    gpu_problem: str
    gpus_seen_at: float | None
    pools: list[Pool]
    workers: list[Worker]
    fork_servers: list[ForkServer]
    running: list[Job]
    queue: list[Job]
    others: list[OthersCall]
    counts: Counts


class Use(_Shape):
    """Seconds held: GPUs, and CPUs reserved (one where a call reserved none)."""

    gpu_seconds: float
    cpu_seconds: float


class User(_Shape):
    """``share``: part of the turns while all wait who have calls now. Limits: 0 running is as many as there is room for."""

    uid: int
    weight: int
    share: float
    queued: int
    running: int
    day: Use
    week: Use
    stored_bytes: int
    queued_jobs: int
    running_jobs: int
    stored_bytes_limit: int


class Others(_Shape):
    """Everybody else together, without names. ``users``: how many of them have calls now."""

    users: int
    queued: int
    running: int
    day: Use
    week: Use


class Users(_Shape):
    """An administrator sees everybody, a user herself and, unless ``[privacy]`` forbids it, all others as one total."""

    users: list[User]
    others: Others | None


class Check(_Shape):
    """``warning``: nothing is ill, but somebody may have meant it otherwise."""

    name: str
    ok: bool
    detail: str
    advice: str
    warning: bool = False


class Doctor(_Shape):
    checks: list[Check]


class Stopping(_Shape):
    """The daemon ends within seconds. ``running``: your jobs that a worker runs."""

    pid: int
    now: bool
    running: int


class Configuration(_Shape):
    """What is in force: the files' values with the defaults, and every limit. ``at_restart``: keys of which the files say something else."""

    file: str
    config: dict[str, object]
    limits: dict[str, int | float]
    at_restart: list[str]


class Environment(_Shape):
    key: str
    requirements: list[str]
    size_bytes: int
    last_used: float


class EnvironmentList(_Shape):
    environments: list[Environment]


class Pruned(_Shape):
    removed: list[str]


class Endpoint(_Shape):
    """A function's route below /f; ``pid`` is the process that serves it."""

    method: str
    path: str
    name: str
    stream: bool
    pid: int


class Endpoints(_Shape):
    endpoints: list[Endpoint]
