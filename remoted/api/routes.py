"""THE table: every path, who may use it, what it takes and gives. What is not here is refused.

Rules are checked before the handler runs; ``own`` handlers look objects up by the peer's uid, so that another's is
not found. The configuration names folders of the host, stopping touches everybody, hence ``admin``.
``tests/security/access_matrix.txt`` is this table as a checked-in file.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from pydantic import BaseModel

from remoted.access import Rule
from remoted.api import devices, endpoints, environments, health, jobs, output, schemas, system, users, workers
from remoted.api.exchange import Ask
from remoted.api.openapi import describe
from remoted.api.services import Services
from remoted.endpoints import METHODS

Handler = Callable[[Services, Ask], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One row. ``answer`` is a shape, or the content type of raw bytes."""

    method: str
    path: str
    rule: Rule
    handler: Handler
    answer: type[BaseModel] | str
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    #: Query and body are a function's: its handler reads them.
    is_open: bool = False

    def match(self, path: str) -> dict[str, str] | None:
        """The path's parameters, undecoded (ids need no decoding); None if it is another path."""
        if self.path.endswith("/{path...}"):
            beginning = self.path.removesuffix("/{path...}")
            return {"path": path.removeprefix(beginning)} if path.startswith(f"{beginning}/") else None
        mine, given = self.path.split("/"), path.split("/")
        if len(mine) != len(given):
            return None
        parameters: dict[str, str] = {}
        for expected, part in zip(mine, given, strict=True):
            if expected.startswith("{"):
                parameters[expected[1:-1]] = part
            elif expected != part:
                return None
        return parameters


async def _openapi(services: Services, ask: Ask) -> web.StreamResponse:
    """This table as an OpenAPI document."""
    return web.json_response(describe(route for route in ROUTES if not route.is_open))


_BYTES, _LOG, _JSON, _METRICS = "application/octet-stream", "application/x-remoted-log", "application/json", "text/plain"

# fmt: off
ROUTES: tuple[Route, ...] = (
    Route("GET",  "/v1/version",            Rule.ANYBODY, system.version,                 schemas.Version),
    Route("GET",  "/v1/openapi.json",       Rule.ANYBODY, _openapi,                       _JSON),
    Route("GET",  "/metrics",               Rule.ANYBODY, system.metrics,                 _METRICS),
    Route("GET",  "/v1/status",             Rule.OWN,     system.status,                  schemas.Status),
    Route("GET",  "/v1/jobs",               Rule.OWN,     jobs.list_jobs,                 schemas.Jobs,            query=schemas.JobsQuery),
    Route("GET",  "/v1/jobs/{id}",          Rule.OWN,     jobs.show,                      schemas.JobDetail),
    Route("GET",  "/v1/jobs/{id}/logs",     Rule.OWN,     output.read_logs,               _LOG,                    query=schemas.LogsQuery),
    Route("GET",  "/v1/jobs/{id}/result",   Rule.OWN,     jobs.result,                    _BYTES),
    Route("GET",  "/v1/jobs/{id}/wait",     Rule.OWN,     jobs.wait,                      schemas.JobDetail,       query=schemas.WaitQuery),
    Route("POST", "/v1/jobs/{id}/cancel",   Rule.OWN,     jobs.cancel,                    schemas.Asked,           body=schemas.NoBody),
    Route("POST", "/v1/jobs/{id}/end",      Rule.ADMIN,   jobs.end,                       schemas.Asked,           body=schemas.NoBody),
    Route("POST", "/v1/jobs/{id}/retry",    Rule.OWN,     jobs.retry,                     schemas.Retried,         body=schemas.RetryBody),
    Route("GET",  "/v1/endpoints",          Rule.OWN,     endpoints.list_endpoints,       schemas.Endpoints),
    Route("GET",  "/v1/endpoints/openapi.json", Rule.OWN, endpoints.openapi,              _JSON),
    Route("GET",  "/v1/gpus",               Rule.ANYBODY, devices.gpus,                   schemas.Gpus),
    Route("GET",  "/v1/workers",            Rule.OWN,     workers.workers,                schemas.Workers),
    Route("GET",  "/v1/environments",       Rule.OWN,     environments.list_environments, schemas.EnvironmentList),
    Route("POST", "/v1/environments/prune", Rule.OWN,     environments.prune,             schemas.Pruned,          body=schemas.PruneBody),
    Route("GET",  "/v1/users",              Rule.OWN,     users.users,                    schemas.Users),
    Route("GET",  "/v1/config",             Rule.ADMIN,   system.config,                  schemas.Configuration),
    Route("GET",  "/v1/doctor",             Rule.ANYBODY, health.doctor,                  schemas.Doctor),
    Route("GET",  "/v1/drain",              Rule.ADMIN,   system.drained,                 schemas.Drained),
    Route("POST", "/v1/drain",              Rule.ADMIN,   system.drain,                   schemas.Drained,         body=schemas.DrainBody),
    Route("POST", "/v1/resume",             Rule.ADMIN,   system.resume,                  schemas.Drained,         body=schemas.NoBody),
    Route("POST", "/v1/stop",               Rule.ADMIN,   system.stop,                    schemas.Stopping,        body=schemas.StopBody),
    *(Route(method, "/f/{path...}",         Rule.OWN,     endpoints.answer,               _BYTES,                  is_open=True) for method in METHODS),
)
# fmt: on
