"""What the handlers may use, handed in whole by the composition root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from remoted.accounts import Accounts
from remoted.clock import Clock
from remoted.direct import DirectCalls
from remoted.endpoints import Endpoints
from remoted.engine import Engine
from remoted.environments import EnvironmentSource
from remoted.jobs import Jobs
from remoted.lag import Lag
from remoted.limits import Limits
from remoted.paths import Paths
from remoted.settings import Settings
from remoted.tally import Tally


@dataclass(frozen=True, slots=True)
class Services:
    """One daemon as its API sees it."""

    jobs: Jobs
    direct: DirectCalls
    endpoints: Endpoints
    engine: Engine
    environments: EnvironmentSource
    settings: Settings
    limits: Limits
    paths: Paths
    clock: Clock
    #: End the daemon soon, with or without the running jobs.
    stop: Callable[[bool], None]
    #: When this daemon began to serve, on the monotonic clock.
    started_at: float
    lag: Lag
    tally: Tally
    mode: str = "user"
    accounts: Accounts = field(default_factory=Accounts)
