"""``dependencies=``: Python environments over the callers' own interpreters, built once with uv, shared, kept.

Never starts a process itself (the runner is handed in) and never runs a caller's text as an option of anything.

    request      what is asked, and the check of it       installer    uv's command lines and complaints
    interpreter  the caller's Python as facts (probe)     build        resolve, create, install, point to the caller
    callers      the caller's packages for the resolver   shelf        what lies on disk
    sharing      one build for all who wait               manager      ``Environments``, the way in
"""

from __future__ import annotations

from remoted.environments.manager import Environment, Environments, EnvironmentSource
from remoted.environments.request import BadRequirement, EnvironmentFailed, EnvironmentRequest, normalise
from remoted.environments.running import HelperRunner, HelperStatus
from remoted.environments.shelf import EnvironmentEntry

__all__ = [
    "BadRequirement",
    "Environment",
    "EnvironmentEntry",
    "EnvironmentFailed",
    "EnvironmentRequest",
    "EnvironmentSource",
    "Environments",
    "HelperRunner",
    "HelperStatus",
    "normalise",
]
