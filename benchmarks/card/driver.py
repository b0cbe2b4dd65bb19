"""The driver's checkpoint calls by ctypes (CUDA driver API, section "Checkpointing"; driver 570 and later), and a process
that makes them for others.

A call may block for as long as it moves memory, so it is made by a process that can be killed: ``python driver.py`` reads
lines ``OPERATION PID`` and answers each with a line of JSON: code, seconds and, for ``state``, the state.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

STATES = ("running", "locked", "checkpointed", "failed")
_LOCK_TIMEOUT_MS = 5_000


class _LockArguments(ctypes.Structure):
    """CUcheckpointLockArgs."""

    _fields_ = (("timeout_ms", ctypes.c_uint), ("reserved0", ctypes.c_uint), ("reserved1", ctypes.c_uint64 * 7))


class Driver:
    """One process's libcuda with ``cuInit`` done."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self.init_code = int(self._cuda.cuInit(0))

    def ask(self, operation: str, pid: int) -> dict[str, Any]:
        begin = time.perf_counter()
        answer: dict[str, Any] = {"operation": operation}
        if operation == "state":
            state = ctypes.c_int(-1)
            code = self._cuda.cuCheckpointProcessGetState(pid, ctypes.byref(state))
            answer["state"] = STATES[state.value] if 0 <= state.value < len(STATES) else state.value
        elif operation == "lock":
            code = self._cuda.cuCheckpointProcessLock(pid, ctypes.byref(_LockArguments(_LOCK_TIMEOUT_MS)))
        else:
            call = {"checkpoint": "Checkpoint", "restore": "Restore", "unlock": "Unlock"}[operation]
            code = getattr(self._cuda, f"cuCheckpointProcess{call}")(pid, None)
        return {**answer, "code": int(code), "seconds": time.perf_counter() - begin}


def main() -> None:
    driver = Driver()
    print(json.dumps({"operation": "init", "code": driver.init_code}), flush=True)
    for line in sys.stdin:
        operation, pid = line.split()
        print(json.dumps(driver.ask(operation, int(pid))), flush=True)


if __name__ == "__main__":
    main()
