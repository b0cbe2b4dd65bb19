"""How a process ended that somebody else has waited for: an adopted worker is init's child."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from remoted.spawn import reaper

KERNEL = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


@pytest.mark.skipif(KERNEL < (6, 15), reason="the kernel does not tell before Linux 6.15 (PIDFD_INFO_EXIT)")
@pytest.mark.parametrize(("script", "expected"), [("exit 7", reaper.ExitStatus(code=7)), ("kill -9 $$", reaper.ExitStatus(signal=signal.SIGKILL))])
def test_c09_the_end_of_somebody_elses_child_is_known_once_that_has_collected_it(script: str, expected: reaper.ExitStatus) -> None:
    process = subprocess.Popen(["sh", "-c", f"read go; {script}"], stdin=subprocess.PIPE)
    pidfd = os.pidfd_open(process.pid)
    assert reaper.collected(pidfd) is None

    process.communicate(b"\n")

    assert reaper.collected(pidfd) == reaper.reap(pidfd) == expected
    os.close(pidfd)


def test_c09_what_is_no_process_has_not_ended() -> None:
    null = os.open("/dev/null", os.O_RDONLY)

    assert reaper.collected(null) is None
    os.close(null)
