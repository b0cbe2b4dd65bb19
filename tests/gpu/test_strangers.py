"""SURFACE C07: whether the processes on a card make it taken. Pure, without a driver."""

from __future__ import annotations

import pytest

from remoted.gpu.strangers import DESKTOP_BYTES, UNSEEN, Strangers, find_strangers
from remoted.model import DeviceProcess, DeviceUse, DeviceUuid

MIB = 1 << 20
XORG = DeviceProcess(812, 300 * MIB, graphics_only=True)
SHELL = DeviceProcess(990, 150 * MIB, graphics_only=True)
GAME = DeviceProcess(4000, 4096 * MIB, graphics_only=True)
TRAINING = DeviceProcess(5000, 200 * MIB)
HIDDEN = DeviceProcess(6000, None, graphics_only=True)


def use(*processes: DeviceProcess, unexplained_bytes: int = 0) -> DeviceUse:
    used_bytes = sum(process.used_bytes or 0 for process in processes) + unexplained_bytes
    return DeviceUse(DeviceUuid("GPU-1"), used_bytes, 0, processes)


@pytest.mark.parametrize(
    ("on_card", "expected"),
    [
        (use(), Strangers()),
        (use(XORG, SHELL), Strangers(desktop=(812, 990))),
        (use(XORG, TRAINING), Strangers(taking=(5000,), desktop=(812,))),
        (use(XORG, GAME), Strangers(taking=(4000, 812))),
        (use(XORG, HIDDEN), Strangers(taking=(6000, 812))),
        (use(unexplained_bytes=900 * MIB), Strangers()),
        (use(unexplained_bytes=2048 * MIB), Strangers(taking=(UNSEEN,))),
        (use(XORG, SHELL, unexplained_bytes=900 * MIB), Strangers(desktop=(812, 990))),
        (use(XORG, unexplained_bytes=2048 * MIB), Strangers(taking=(UNSEEN,), desktop=(812,))),
    ],
    ids=["nobody", "desktop", "desktop and compute", "game", "hidden size", "driver's own", "unseen", "desktop and driver's own", "desktop and unseen"],
)
def test_c07_a_desktop_leaves_a_card_free_and_anybody_else_takes_it(on_card: DeviceUse, expected: Strangers) -> None:
    assert find_strangers(on_card, ()) == expected


def test_c07_the_limit_is_for_all_that_draw_together() -> None:
    within = DeviceProcess(1, DESKTOP_BYTES - 300 * MIB, graphics_only=True)
    beyond = DeviceProcess(1, DESKTOP_BYTES - 299 * MIB, graphics_only=True)

    assert find_strangers(use(XORG, within), ()).taking == ()
    assert set(find_strangers(use(XORG, beyond), ()).taking) == {1, 812}


def test_c07_what_the_holder_draws_and_computes_is_no_strangers() -> None:
    assert find_strangers(use(XORG, GAME, TRAINING), {4000, 5000}) == Strangers(desktop=(812,))
