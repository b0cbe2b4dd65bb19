"""What a spawned child of a worker runs in place of the caller's script: see ``mainfile``."""

from __future__ import annotations

from remoted_client.codec.mainfile import restore

globals().update(restore())
