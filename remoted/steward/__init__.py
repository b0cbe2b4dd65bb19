"""Environments where the daemon is root: each user's are kept by a process of that user, the steward.

Building asks a caller's interpreter, looks into the caller's folders and runs strangers' build scripts. Nothing of that
is done by root (T30, T36): the steward is the daemon's own program, run as the user, and ``remoted.environments`` works in it
as it does in a user's own daemon. The daemon asks over a channel and takes every answer as the user's word.

    words      what is asked and answered, as JSON
    program    the steward: ``python -I -m remoted.steward.program FD``
    stewards   the daemon's side: starts stewards, asks them, lets idle ones go
"""

from __future__ import annotations

from remoted.steward.stewards import Stewards

__all__ = ["Stewards"]
