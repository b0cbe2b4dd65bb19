"""Who holds a secret, and when its file goes."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from remoted.blobs import Blobs
from remoted.contents import Contents
from remoted.limits import Limits
from remoted.paths import Paths
from remoted.store import Store
from remoted_client import wire

UID = 1000
SECRET = b"TOKEN=swordfish"
DIGEST = hashlib.sha256(SECRET).hexdigest()


async def test_t49_a_secret_that_is_stored_again_while_its_last_holder_ends_keeps_its_file(tmp_path: Path) -> None:
    """Else the job that comes behind it cannot be found again by the next daemon: its environment is gone."""
    paths = Paths(tmp_path, tmp_path, tmp_path / "config.toml")
    paths.secrets.mkdir()
    blobs = Blobs(paths, 0)
    contents = Contents(Store(tmp_path / "unused"), blobs, Limits())
    file = blobs.secret_path(UID, DIGEST)
    await contents.put(UID, DIGEST, "context", wire.Frame({}, SECRET), 0.0)
    first = file.stat().st_ino

    again = asyncio.create_task(contents.put(UID, DIGEST, "context", wire.Frame({}, SECRET), 0.0))
    for _ in range(3):  # until it is a thread's
        await asyncio.sleep(0)
    while file.stat().st_ino == first:  # its thread has written it, and nobody here knows yet
        pass
    contents.release(UID, DIGEST)
    await again

    assert file.read_bytes() == SECRET
    contents.release(UID, DIGEST)
    assert not file.exists()
