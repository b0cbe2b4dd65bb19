"""What ``remotectl doctor`` says of a card that nothing drives, from a tree like /sys/bus/pci/devices."""

from __future__ import annotations

from pathlib import Path

from remoted.cli.checks import nvidia_cards, without_driver


def _device(tree: Path, address: str, vendor: str, kind: str) -> None:
    (tree / address).mkdir()
    (tree / address / "vendor").write_text(f"{vendor}\n", encoding="ascii")
    (tree / address / "class").write_text(f"{kind}\n", encoding="ascii")


def test_c04_cards_are_nvidias_display_controllers_and_nothing_else_of_theirs(tmp_path: Path) -> None:
    _device(tmp_path, "0000:01:00.0", "0x10de", "0x030000")
    _device(tmp_path, "0000:01:00.1", "0x10de", "0x040300")  # the sound of its HDMI connector
    _device(tmp_path, "0000:41:00.0", "0x10de", "0x030200")  # a card without a screen
    _device(tmp_path, "0000:00:02.0", "0x8086", "0x030000")
    (tmp_path / "0000:02:00.0").mkdir()

    assert nvidia_cards(tmp_path) == ["0000:01:00.0", "0000:41:00.0"]
    assert nvidia_cards(tmp_path / "no-such-bus") == []


def test_c04_no_driver_is_well_without_a_card_and_a_warning_with_one() -> None:
    well, warned = without_driver("no library", []), without_driver("no library", ["0000:01:00.0"])

    assert (well["ok"], well["warning"]) == (True, False)
    assert (warned["ok"], warned["warning"]) == (True, True)
    assert "0000:01:00.0" in warned["detail"]
    assert "install NVIDIA's driver" in warned["advice"]
