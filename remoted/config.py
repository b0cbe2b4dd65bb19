"""The daemon's configuration: a TOML file, checked whole before anything uses it.

Unknown keys are refused with their names: a typing error must not silently mean the default.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from remoted.errors import StartupError
from remoted.limits import Limits

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class GpuSettings(BaseModel):
    """``[gpu]``: where NVML is and how long it may take."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    nvml_library: str | None = None
    nvml_deadline_seconds: float = Field(default=5.0, gt=0)
    poll_seconds: float = Field(default=2.0, gt=0)
    #: Where the daemons of several users lock GPUs against each other.
    lock_folder: str = "/run/lock"


class EnvironmentSettings(BaseModel):
    """``[environments]``: where packages come from. ``offline`` forbids every index."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    wheel_folders: tuple[str, ...] = ()
    offline: bool = False
    build_deadline_seconds: float = Field(default=3600.0, gt=0)


class UserSettings(BaseModel):
    """``[users]``, of the system's daemon: whom it serves."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    #: May root's functions run, as root?
    allow_root: bool = False
    #: Serve uids without an account too?
    allow_unknown_uids: bool = False


class WorkerSettings(BaseModel):
    """``[workers]``, of the system's daemon: what they may do."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    #: sudo and other setuid programs gain nothing inside of a worker.
    no_new_privileges: bool = True


class AuditSettings(BaseModel):
    """``[audit]``: a line for each call that ended, in the journal or the log."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    #: If it is not said: of the system's daemon yes, of a user's own no.
    enabled: bool | None = None
    #: May it hold the names that users give to jobs and pools?
    names: bool = True


#: What is different where many users share a daemon: nobody may take half of it.
_SHARED_LIMITS = {"connections_per_uid": 256, "connections_total": 4096}


class Config(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cpus: int | None = Field(default=None, ge=1)
    gpu: GpuSettings = GpuSettings()
    environments: EnvironmentSettings = EnvironmentSettings()
    users: UserSettings = UserSettings()
    workers: WorkerSettings = WorkerSettings()
    audit: AuditSettings = AuditSettings()
    limits: dict[str, float] = Field(default_factory=dict)

    def build_limits(self, shared: bool = False) -> Limits:
        """The defaults (``shared``: of a daemon for many users) with ``[limits]`` over them. Raises StartupError naming an unknown limit."""
        known = {field.name: field.type for field in fields(Limits)}
        for name, value in self.limits.items():
            if name not in known:
                raise StartupError(f"cannot use limit {name!r}: it does not exist; known are {', '.join(sorted(known))}")
            if value < 0:
                raise StartupError(f"cannot use limit {name} = {value}: it must not be negative")
        chosen = {**(_SHARED_LIMITS if shared else {}), **self.limits}
        return Limits(**{name: int(value) if known[name] == "int" else value for name, value in chosen.items()})  # type: ignore[arg-type]


def load(path: Path) -> Config:
    """Read ``path``; a missing file means the defaults. Raises StartupError naming the key and the reason."""
    try:
        document: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Config()
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot read {path}: {error}") from error
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise StartupError(f"cannot use {path}: {problems}") from error
