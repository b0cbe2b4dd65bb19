"""The daemon's configuration: what its files may say (``config_files`` reads them), checked whole before anything uses it.

Unknown keys are refused with their names: a typing error must not silently mean the default.
"""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict, Field


class GpuSettings(BaseModel):
    """``[gpu]``: where NVML is and how long it may take."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    nvml_library: str | None = None
    nvml_deadline_seconds: float = Field(default=5.0, gt=0)
    poll_seconds: float = Field(default=2.0, gt=0)
    #: May a worker of the system's daemon open only the cards that are lent to it?
    enforce: bool = True
    #: Where the daemons of several users lock GPUs against each other.
    lock_folder: str = "/run/lock"


class EnvironmentSettings(BaseModel):
    """``[environments]``: where packages come from. ``offline`` forbids every index."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    wheel_folders: tuple[str, ...] = ()
    offline: bool = False
    build_deadline_seconds: float = Field(default=3600.0, gt=0)


class UserShare(BaseModel):
    """``[users.NAME_OR_UID]``: what one user has instead of what everybody has."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    #: Of two users who wait one with twice the weight has twice the turns.
    weight: int = Field(default=1, ge=1, le=100)
    queued_jobs: int | None = Field(default=None, ge=0)
    running_jobs: int | None = Field(default=None, ge=0)
    stored_bytes: int | None = Field(default=None, ge=0)
    connections: int | None = Field(default=None, ge=1)


class UserSettings(BaseModel):
    """``[users]``: whom the system's daemon serves; and a table for each user who has something of his own."""

    model_config = ConfigDict(extra="allow", frozen=True)
    # pydantic's way to give unknown keys a type
    __pydantic_extra__: dict[str, UserShare] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]
    #: May root's functions run, as root?
    allow_root: bool = False
    #: Serve uids without an account too?
    allow_unknown_uids: bool = False

    @property
    def shares(self) -> dict[str, UserShare]:
        return self.__pydantic_extra__


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


class Seen(str, Enum):
    """How much users see of one another."""

    #: Of each call its name, user, pool, state, GPUs and times.
    WORK = "work"
    #: How much of everything there is, and who has a GPU.
    TOTALS = "totals"
    #: That a GPU is not free.
    NOTHING = "nothing"


class PrivacySettings(BaseModel):
    """``[privacy]``: nobody but an administrator sees more of others than this."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    others: Seen = Seen.WORK


#: What is different where many users share a daemon: nobody may take half of it.
SHARED_LIMITS = {
    "connections_per_uid": 256,
    "connections_total": 4096,
    "requests_per_second_per_uid": 500,
    "frames_per_second_per_uid": 20_000,
    "fork_servers_total": 64,
    "fork_servers_per_uid": 4,
}


class Config(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cpus: int | None = Field(default=None, ge=1)
    gpu: GpuSettings = GpuSettings()
    environments: EnvironmentSettings = EnvironmentSettings()
    users: UserSettings = UserSettings()
    workers: WorkerSettings = WorkerSettings()
    audit: AuditSettings = AuditSettings()
    privacy: PrivacySettings = PrivacySettings()
    limits: dict[str, float] = Field(default_factory=dict)
