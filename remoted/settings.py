"""What is in force: read at the start, and changed by a reload as far as it can change while the daemon runs.

``limits`` is one object for the daemon's whole life: whoever holds it asks it when the moment comes, so a change is seen
everywhere at once. What was built into something at the start stays as it was, and is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from remoted.config import Config
from remoted.config_files import Reading

#: Keys, or beginnings of keys, that take effect at once.
_LIVE = ("limits.", "users.", "gpu.poll_seconds", "audit.names", "privacy.")
_AT_RESTART = frozenset(
    {
        "limits.workers_total",
        "limits.workers_reserved",
        "limits.crash_loop_count",
        "limits.crash_loop_seconds",
        "limits.free_disk_reserve_bytes",
        "limits.user_mode_idle_seconds",
        "users.allow_root",
        "users.allow_unknown_uids",
    }
)


def is_live(key: str) -> bool:
    """Does a change of this key take effect without a restart?"""
    return key.startswith(_LIVE) and key not in _AT_RESTART


@dataclass(frozen=True, slots=True)
class Changes:
    """Keys that differ from what was in force: those that hold now, and those that hold after a restart."""

    live: tuple[str, ...]
    at_restart: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{', '.join(self.live)} changed"] if self.live else []
        parts += [f"{', '.join(self.at_restart)}: changes at the next start (a restart harms no running job)"] if self.at_restart else []
        return "; ".join(parts) or "nothing changed"


class Settings:
    """Of one daemon."""

    def __init__(self, reading: Reading) -> None:
        self.file = reading.file
        self.config = reading.config
        self.limits = reading.limits
        #: What the files say and is not in force.
        self.at_restart: tuple[str, ...] = ()

    def differences(self, reading: Reading) -> Changes:
        """What the files say now and is not in force."""
        before, after = _flat(self.config, self.limits.values()), _flat(reading.config, reading.limits.values())
        different = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        return Changes(tuple(filter(is_live, different)), tuple(key for key in different if not is_live(key)))

    def take(self, reading: Reading) -> Changes:
        """Let what can change be as it was read now. Raises StartupError, and nothing has changed, if there is a problem."""
        changes = self.differences(reading.require())
        self.limits.follow(reading.limits, but=[key.removeprefix("limits.") for key in changes.at_restart])
        self.config = _with_live(self.config, reading.config)
        self.at_restart = changes.at_restart
        return changes


def _flat(config: Config, limits: dict[str, int | float]) -> dict[str, Any]:
    """By dotted key; limits as they hold, not only those that a file names."""
    found: dict[str, Any] = {f"limits.{name}": value for name, value in limits.items()}
    for name, section in config.model_dump(exclude={"limits"}).items():
        found |= {f"{name}.{key}": value for key, value in section.items()} if isinstance(section, dict) else {name: section}
    return found


def _with_live(old: Config, new: Config) -> Config:
    """The old one with every live key of the new one."""
    kept = {f"{name}": getattr(old.users, name) for name in type(old.users).model_fields}
    return old.model_copy(
        update={
            "limits": {**{name: value for name, value in new.limits.items() if is_live(f"limits.{name}")}, **{name: value for name, value in old.limits.items() if not is_live(f"limits.{name}")}},
            "users": new.users.model_copy(update=kept),
            "gpu": old.gpu.model_copy(update={"poll_seconds": new.gpu.poll_seconds}),
            "privacy": new.privacy,
            "audit": old.audit.model_copy(update={"names": new.audit.names}),
        }
    )
