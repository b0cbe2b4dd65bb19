"""From a request to what a worker must be that serves it."""

from __future__ import annotations

from typing import NamedTuple

from remoted.access import Identity
from remoted.contents import Contents
from remoted.cradle import WorkerPlan
from remoted.engine import Engine
from remoted.environments import EnvironmentFailed, EnvironmentRequest, normalise
from remoted.errors import BadRequest, RemotedError
from remoted.model import Uid
from remoted.requests import Request
from remoted.scheduler import matching
from remoted.scheduler.state import Need, PoolPolicy, Ticket
from remoted.spec import Context, JobSpec, kind_id

_INSTALLER_VARIABLES = frozenset({"PATH", "HOME", "LANG", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"})
_INSTALLER_PREFIXES = ("UV_", "PIP_", "SSL_CERT_", "HTTP_", "HTTPS_", "ALL_PROXY", "NO_PROXY", "http_", "https_", "all_proxy", "no_proxy")
_KINDS_MOST = 4096


class Wanted(NamedTuple):
    """What all calls with the same content need."""

    need: Need
    cpus: float
    policy: PoolPolicy

    def ticket(self, call_id: str, request: Request, ancestors: tuple[str, ...]) -> Ticket:
        return Ticket(call_id, self.need, self.cpus, request.options.priority, ancestors)


class Needs:
    """Knows which kinds of workers there are, and tells the engine how they are started."""

    def __init__(self, engine: Engine, contents: Contents, kind_key: bytes) -> None:
        self._engine = engine
        self._contents = contents
        self._kind_key = kind_key
        self._kinds: dict[tuple[int, str, str, Identity | None], tuple[str, str | None]] = {}

    def of(self, uid: int, request: Request, spec: JobSpec) -> Wanted:
        """Raises BadRequest when this host can never serve the call; names what the host has."""
        self._contents.require(uid, *request.digests)
        context = self._contents.context(uid, request.context)
        gpu = self._gpu_request(spec)
        self._refuse_what_is_missing(spec)
        kind, environment = self._kind(uid, request, spec, context)
        need = Need(
            uid=Uid(uid),
            pool=(uid, spec.pool.class_, spec.pool.name),
            kind=kind,
            gpu=gpu,
            concurrency=spec.pool.max_concurrency,
            is_alone=spec.function.blocks and spec.pool.max_concurrency > 1,
            environment=environment,
            instance=instance_key(uid, request.instance[0]) if request.instance else None,
        )
        if spec.pool.workers_min:
            self._engine.holders.hold(need.pool, spec.pool.keep_warm_seconds)
        cpus = min(spec.pool.cpus or 0.0, self._engine.scheduler.cpus)
        return Wanted(need, cpus, PoolPolicy(spec.pool.workers_min, spec.pool.workers_max, spec.pool.idle_timeout_seconds or 300.0))

    def _kind(self, uid: int, request: Request, spec: JobSpec, context: Context) -> tuple[str, str | None]:
        """(kind, environment); the engine knows from here on how such workers are started. Worked out once per spec and context."""
        key = (uid, request.spec, request.context, request.identity)
        if key not in self._kinds:
            kind = kind_id(self._kind_key, spec, context, spec.pool.gpus, request.identity)
            plan = self._engine.plans.learn(uid, kind, self._plan(uid, spec, context, request.identity))
            if len(self._kinds) >= _KINDS_MOST:
                self._kinds.clear()
            self._kinds[key] = (kind, plan.environment.digest if plan.environment else None)
        return self._kinds[key]

    def plan_again(self, uid: int, request: Request, spec: JobSpec) -> WorkerPlan | None:
        """That of a call which was admitted before. None: its surroundings are gone."""
        try:
            context = self._contents.context(uid, request.context)
            plan = self._plan(uid, spec, context, request.identity)
        except (RemotedError, OSError):
            return None
        return self._engine.plans.learn(uid, kind_id(self._kind_key, spec, context, spec.pool.gpus, request.identity), plan)

    def _gpu_request(self, spec: JobSpec) -> matching.GpuRequest | None:
        if not spec.pool.gpu:
            return None
        request = matching.parse_request(spec.pool.gpus or ("ANY",), spec.pool.gpu_count)
        devices = self._engine.devices
        problem = matching.explain_impossible(request, devices.known) or matching.explain_old_driver(spec.pool.cuda_min, devices.cuda)
        if problem is not None:
            raise BadRequest("NO_MATCHING_GPU", problem + (f" ({devices.problem})" if devices.problem else ""))
        return request

    def _refuse_what_is_missing(self, spec: JobSpec) -> None:
        """What this version cannot do is refused before anything runs, never ignored."""
        if spec.pool.isolation != "subprocess" or spec.pool.image:
            raise BadRequest("NOT_SUPPORTED", "cannot run in a container: this version has isolation='subprocess' only; leave isolation and imageName out")
        if spec.pool.volume is not None:
            raise BadRequest("NOT_SUPPORTED", f"cannot mount the network volume {spec.pool.volume.id}: this version has no volumes; pass the path of a folder instead")

    def _plan(self, uid: int, spec: JobSpec, context: Context, identity: Identity | None) -> WorkerPlan:
        keep = ("HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "XDG_CACHE_HOME")
        environ = {name: context.environ[name] for name in keep if name in context.environ} | context.worker_variables()
        request = None
        if spec.dependencies:
            try:
                normalise(spec.dependencies)
            except EnvironmentFailed as error:
                raise BadRequest("BAD_REQUIREMENT", str(error)) from error
            request = EnvironmentRequest(
                uid=uid,
                executable=spec.executable,
                requirements=spec.dependencies,
                isolated=spec.pool.isolated,
                accelerate_downloads=spec.accelerate_downloads,
                identity=identity,
            )
        visible = {name: value for name, value in context.environ.items() if name in _INSTALLER_VARIABLES or name.startswith(_INSTALLER_PREFIXES)}
        return WorkerPlan(
            executable=spec.executable,
            environ=environ,
            memory_bytes=spec.pool.memory_bytes,
            cpus=min(spec.pool.cpus, self._engine.scheduler.cpus) if spec.pool.cpus else None,
            environment=request,
            descriptors=context.descriptors,
            version=spec.python,
            build_environ=visible,
            identity=identity,
            preload=spec.pool.preload,
            hints=frozenset(spec.function.imports),
            import_environ=context.import_variables(),
        )


def instance_key(uid: int, instance: str) -> str:
    """Ids are made by clients: nobody's id means another user's object."""
    return f"{uid}:{instance}"
