"""What this package needs of the outside: somebody who runs a short-lived process (``remoted.spawn.helper``).

Processes are started only in ``remoted.spawn``, which stands on the same floor; it is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class HelperStatus(Protocol):
    """How the process ended; ``code`` is None when a signal ended it."""

    @property
    def code(self) -> int | None: ...

    def describe(self) -> str: ...


class HelperRunner(Protocol):
    """Raises SpawnError when it cannot start, TimeoutError when it was killed at its deadline."""

    async def __call__(
        self,
        argv: Sequence[str],
        environ: Mapping[str, str],
        on_output: Callable[[bytes], None],
        deadline_seconds: float,
        /,
    ) -> HelperStatus: ...
