"""The daemon's configuration: what its files may say (``config_files`` reads them), checked whole before anything uses it.

Unknown keys are refused with their names: a typing error must not silently mean the default.
"""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict, Field


class GpuSettings(BaseModel):
    """``[gpu]``: where NVML is and how long it may take."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    #: NVML's library, where it is not found by its name.
    nvml_library: str | None = Field(default=None, examples=["libnvidia-ml.so.1"])
    #: A driver that does not answer for so long is not waited for.
    nvml_deadline_seconds: float = Field(default=5.0, gt=0)
    #: Between two looks at the cards.
    poll_seconds: float = Field(default=2.0, gt=0)
    #: May a worker of the system's daemon open only the cards that are lent to it?
    enforce: bool = True
    #: Where the daemons of several users lock GPUs against each other.
    lock_folder: str = "/run/lock"


class EnvironmentSettings(BaseModel):
    """``[environments]``: where packages come from. ``offline`` forbids every index."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    #: Folders with wheels, beside the index.
    wheel_folders: tuple[str, ...] = Field(default=(), strict=False)
    #: Use no index at all?
    offline: bool = False
    #: An installation that takes longer has failed.
    build_deadline_seconds: float = Field(default=3600.0, gt=0)


class UserShare(BaseModel):
    """``[users.NAME_OR_UID]``: what one user has instead of what everybody has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    #: Of two users who wait one with twice the weight has twice the turns.
    weight: int = Field(default=1, ge=1, le=100)
    #: Instead of the limits of that name with _per_uid:
    queued_jobs: int | None = Field(default=None, ge=0, examples=[500_000])
    #: At once; 0 is as many as there is room for.
    running_jobs: int | None = Field(default=None, ge=0, examples=[8])
    #: All that is kept of the user on the disk.
    stored_bytes: int | None = Field(default=None, ge=0, examples=[100 << 30])
    #: To each of the two sockets.
    connections: int | None = Field(default=None, ge=1, examples=[512])


class UserSettings(BaseModel):
    """``[users]``: whom the system's daemon serves; and a table for each user who has something of his own."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
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

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    #: sudo and other setuid programs gain nothing inside of a worker.
    no_new_privileges: bool = True


class AuditSettings(BaseModel):
    """``[audit]``: a line for each call that ended, in the journal or the log."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    #: If it is not said: of the system's daemon yes, of a user's own no.
    enabled: bool | None = Field(default=None, examples=[True])
    #: May it hold the names that users give to jobs and pools?
    names: bool = True


class Seen(str, Enum):
    """How much users see of one another."""

    WORK = "work"
    TOTALS = "totals"
    NOTHING = "nothing"


class PrivacySettings(BaseModel):
    """``[privacy]``: nobody but an administrator sees more of others than this."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    #: "work": of each call its name, user, pool, state, GPUs and times. "totals": how much of everything there is, and who has a GPU. "nothing": that a GPU is not free.
    others: Seen = Field(default=Seen.WORK, strict=False)


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

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    #: How many CPUs are lent; where it is not said, all of the host's.
    cpus: int | None = Field(default=None, ge=1, examples=[8])
    gpu: GpuSettings = GpuSettings()
    environments: EnvironmentSettings = EnvironmentSettings()
    users: UserSettings = UserSettings()
    workers: WorkerSettings = WorkerSettings()
    audit: AuditSettings = AuditSettings()
    privacy: PrivacySettings = PrivacySettings()
    #: Every cap, with its unit in its name; those that end in _per_uid are of each user.
    limits: dict[str, float] = Field(default_factory=dict)
