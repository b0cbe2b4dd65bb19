"""Was a process or thread refused because of the worker's limit? The kernel's own errors do not name it."""

from __future__ import annotations

import contextlib
import errno


class Refusals:
    """Compares the count of refusals with the last one that was seen; each explains the next error that may come of it."""

    def __init__(self) -> None:
        self._file, self._limit, self._seen = "", 0, 0

    def watch(self, file: str, limit: int) -> None:
        """``file`` counts refusals (pids.events of the worker's cgroup); "" where nobody counts."""
        self._file, self._limit = file, limit
        self._seen = self._count()

    def explain(self, error: BaseException) -> str:
        """What to say beside ``error``, or ""."""
        is_refusal = (isinstance(error, OSError) and error.errno == errno.EAGAIN) or (isinstance(error, RuntimeError) and "start new thread" in str(error))
        if not self._file or not is_refusal:
            return ""
        before, self._seen = self._seen, self._count()
        if self._seen <= before:
            return ""
        return f"the worker may have {self._limit} processes and threads at once, the worker_tasks in [limits] of the daemon's config.toml"

    def _count(self) -> int:
        with contextlib.suppress(OSError, ValueError, StopIteration), open(self._file, encoding="utf-8") as file:
            return int(next(line for line in file if line.startswith("max ")).split()[1])
        return 0
