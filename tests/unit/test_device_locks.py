"""C07 in user mode: two daemons on one host do not lend the same GPU, as far as locks between users can say."""

from __future__ import annotations

from pathlib import Path

from remoted.gpu.locks import DeviceLocks
from remoted.model import DeviceUuid

A, B = DeviceUuid("GPU-a"), DeviceUuid("GPU-b")


def test_c07_all_devices_or_none_and_released_with_the_holder(tmp_path: Path) -> None:
    mine, theirs = DeviceLocks(tmp_path), DeviceLocks(tmp_path)
    assert mine.acquire((A,))
    assert not theirs.acquire((B, A))
    assert theirs.taken_by_others((A, B)) == {A}
    assert mine.taken_by_others((A, B)) == set()
    mine.release((A,))
    assert theirs.acquire((B, A))
    theirs.release((A, B))


def test_c07_a_folder_that_cannot_be_used_is_no_obstacle(tmp_path: Path) -> None:
    locks = DeviceLocks(tmp_path / "missing")
    assert locks.acquire((A,))
    assert locks.taken_by_others((A,)) == set()


def test_c07_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / "remoted-GPU-a.lock").symlink_to(target)
    assert DeviceLocks(tmp_path).acquire((A,))
    assert not target.exists()
