"""Which cards serve what was asked for (SURFACE row F09), on the numbers that NVML reports for real cards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remoted.model import Device, DeviceUuid
from remoted.scheduler.matching import (
    KNOWN_GROUPS,
    GpuRequest,
    candidates,
    explain_impossible,
    explain_old_driver,
    parse_request,
    serves,
)

#: name: (MiB as NVML reports it, compute capability, group=rank ...); groups not listed refuse the card. ANY is apart.
CARDS: dict[str, tuple[int, tuple[int, int], str]] = {
    "NVIDIA GeForce GT 1030": (2048, (6, 1), ""),
    "NVIDIA GeForce GTX 1080": (8192, (6, 1), ""),
    "Tesla V100-SXM2-16GB": (16384, (7, 0), ""),
    "Tesla V100-SXM2-32GB": (32768, (7, 0), ""),
    "NVIDIA GeForce RTX 2080 Ti": (11264, (7, 5), ""),
    "Tesla T4": (15109, (7, 5), ""),
    "NVIDIA TITAN RTX": (24220, (7, 5), ""),
    "NVIDIA GeForce RTX 3060": (12288, (8, 6), ""),
    "NVIDIA GeForce RTX 3080": (10240, (8, 6), ""),
    "NVIDIA RTX A4000": (15352, (8, 6), "AMPERE_16=0"),
    "NVIDIA RTX A4500": (20470, (8, 6), "AMPERE_16=0"),
    "NVIDIA A16": (15356, (8, 6), "AMPERE_16=1"),
    "NVIDIA A10G": (22731, (8, 6), "AMPERE_16=1 AMPERE_24=1"),
    "NVIDIA A30": (24125, (8, 0), "AMPERE_16=1 AMPERE_24=1"),
    "NVIDIA RTX A5000": (23028, (8, 6), "AMPERE_16=1 AMPERE_24=0"),
    "NVIDIA GeForce RTX 3090": (24268, (8, 6), "AMPERE_16=1 AMPERE_24=0"),
    "NVIDIA GeForce RTX 3090 Ti": (24564, (8, 6), "AMPERE_16=1 AMPERE_24=1"),
    "NVIDIA RTX A6000": (46068, (8, 6), "AMPERE_16=1 AMPERE_24=1 AMPERE_48=0"),
    "NVIDIA A40": (45634, (8, 6), "AMPERE_16=1 AMPERE_24=1 AMPERE_48=0"),
    "NVIDIA A100-SXM4-40GB": (40536, (8, 0), "AMPERE_16=1 AMPERE_24=1"),
    "NVIDIA A100-SXM4-80GB": (81251, (8, 0), "AMPERE_16=1 AMPERE_24=1 AMPERE_48=1 AMPERE_80=0"),
    "NVIDIA RTX 2000 Ada Generation": (16380, (8, 9), "AMPERE_16=0"),
    "NVIDIA GeForce RTX 4080": (16376, (8, 9), "AMPERE_16=2"),
    "NVIDIA L4": (23034, (8, 9), "AMPERE_16=2 AMPERE_24=0 ADA_24=1"),
    "NVIDIA GeForce RTX 4090": (24564, (8, 9), "AMPERE_16=2 AMPERE_24=2 ADA_24=0"),
    "NVIDIA RTX 5000 Ada Generation": (30712, (8, 9), "AMPERE_16=2 AMPERE_24=2 ADA_24=1 ADA_32_PRO=1"),
    "NVIDIA L40S": (46068, (8, 9), "AMPERE_16=2 AMPERE_24=2 AMPERE_48=2 ADA_24=1 ADA_32_PRO=1 ADA_48_PRO=0"),
    "NVIDIA H100 80GB HBM3": (
        81559,
        (9, 0),
        "AMPERE_16=2 AMPERE_24=2 AMPERE_48=2 AMPERE_80=2 ADA_24=2 ADA_32_PRO=2 ADA_48_PRO=2 ADA_80_PRO=0",
    ),
    "NVIDIA H20": (
        97871,
        (9, 0),
        "AMPERE_16=2 AMPERE_24=2 AMPERE_48=2 AMPERE_80=2 ADA_24=2 ADA_32_PRO=2 ADA_48_PRO=2 ADA_80_PRO=1",
    ),
    "NVIDIA H200": (
        143771,
        (9, 0),
        "AMPERE_16=2 AMPERE_24=2 AMPERE_48=2 AMPERE_80=2 ADA_24=2 ADA_32_PRO=2 ADA_48_PRO=2 ADA_80_PRO=1 HOPPER_141=0",
    ),
    "NVIDIA GeForce RTX 5070 Ti": (16303, (12, 0), "AMPERE_16=2"),
    "NVIDIA GeForce RTX 5090": (32607, (12, 0), "AMPERE_16=2 AMPERE_24=2 ADA_24=2 ADA_32_PRO=0"),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (
        97887,
        (12, 0),
        "AMPERE_16=2 AMPERE_24=2 AMPERE_48=2 AMPERE_80=2 ADA_24=2 "
        "ADA_32_PRO=1 ADA_48_PRO=2 ADA_80_PRO=2 BLACKWELL_96=0",
    ),
    "NVIDIA B200": (
        183359,
        (10, 0),
        "AMPERE_16=2 AMPERE_24=2 AMPERE_48=2 AMPERE_80=2 ADA_24=2 ADA_32_PRO=1 "
        "ADA_48_PRO=2 ADA_80_PRO=2 HOPPER_141=2 BLACKWELL_96=1 BLACKWELL_180=0",
    ),
}

_NAMED_GROUPS = sorted(KNOWN_GROUPS - {"ANY"})


def card(name: str, index: int = 0, *, uuid: str = "GPU") -> Device:
    mebibytes, compute_capability, _ = CARDS[name]
    return device(name, mebibytes, compute_capability, index, uuid=uuid)


def device(
    name: str, mebibytes: int, compute_capability: tuple[int, int] | None, index: int = 0, *, uuid: str = "GPU"
) -> Device:
    return Device(DeviceUuid(f"{uuid}-{index}"), index, index, name, mebibytes << 20, compute_capability)


def names(tier: tuple[Device, ...]) -> list[str]:
    return [one.name for one in tier]


@pytest.mark.parametrize("name", CARDS)
def test_f09_a_group_takes_real_cards_by_name_else_by_generation_and_memory(name: str) -> None:
    ranks = {f"{group}={rank}" for group in _NAMED_GROUPS if (rank := serves(group, card(name))) is not None}

    assert ranks == set(CARDS[name][2].split())


@pytest.mark.parametrize("name", CARDS)
def test_f09_every_card_is_reachable_by_any_and_by_its_own_name(name: str) -> None:
    assert serves("ANY", card(name)) is not None
    assert serves(name, card(name)) == 0


def test_f09_any_leaves_the_card_that_drives_the_monitor_for_last() -> None:
    host = [card("NVIDIA GeForce GT 1030", 0), card("NVIDIA RTX A6000", 1), card("NVIDIA GeForce RTX 3090", 2)]

    (tier,) = candidates(parse_request(["any"], None), host)

    assert names(tier) == ["NVIDIA GeForce RTX 3090", "NVIDIA RTX A6000", "NVIDIA GeForce GT 1030"]


def test_f09_a_gpu_type_is_one_card_and_no_substitute() -> None:
    assert serves("NVIDIA GeForce RTX 3090", card("NVIDIA GeForce RTX 3090 Ti")) is None
    assert serves("NVIDIA GeForce RTX 3090", card("NVIDIA GeForce RTX 4090")) is None


@pytest.mark.parametrize("reported", ["GeForce RTX 3090", "NVIDIA GeForce RTX 3090", "nvidia  geforce rtx 3090"])
def test_f09_names_of_old_drivers_are_the_same_card(reported: str) -> None:
    old = device(reported, 24268, None)

    assert serves("NVIDIA GeForce RTX 3090", old) == serves("AMPERE_24", old) == 0


def test_f09_a_card_of_unknown_generation_serves_its_name_and_any_only() -> None:
    unknown = device("NVIDIA Something", 1 << 20, None)

    assert [group for group in sorted(KNOWN_GROUPS) if serves(group, unknown) is not None] == ["ANY"]


def test_f09_a_generation_after_blackwell_is_a_substitute_for_all() -> None:
    future = device("NVIDIA R100", 294912, (13, 0))

    assert {serves(group, future) for group in _NAMED_GROUPS} == {2}


@pytest.mark.parametrize(
    ("entries", "gpu_count", "expected"),
    [
        (["AMPERE_80"], None, GpuRequest(("AMPERE_80",), 1)),
        (["AMPERE_80", "AMPERE_80"], None, GpuRequest(("AMPERE_80",), 2)),
        (["ADA_24", "AMPERE_80"], None, GpuRequest(("ADA_24", "AMPERE_80"), 1)),
        (["ADA_24", "AMPERE_80", "AMPERE_80"], None, GpuRequest(("ADA_24", "AMPERE_80"), 2)),
        (["AMPERE_80", "AMPERE_80"], 4, GpuRequest(("AMPERE_80",), 4)),
        (["AMPERE_80", "AMPERE_80"], 1, GpuRequest(("AMPERE_80",), 1)),
        (["any", "ANY"], None, GpuRequest(("ANY",), 2)),
        (["ampere_80"], None, GpuRequest(("AMPERE_80",), 1)),
        ([" NVIDIA  L4 "], None, GpuRequest(("NVIDIA L4",), 1)),
        ([], 2, GpuRequest(("ANY",), 2)),
    ],
)
def test_f09_different_entries_are_alternatives_and_repeated_ones_a_count(
    entries: list[str], gpu_count: int | None, expected: GpuRequest
) -> None:
    assert parse_request(entries, gpu_count) == expected


@pytest.mark.parametrize(("entries", "gpu_count"), [(["ANY"], 0), (["ANY"], -1), ([""], None), (["  "], 2)])
def test_f09_a_request_for_nothing_is_refused(entries: list[str], gpu_count: int | None) -> None:
    with pytest.raises(ValueError, match="cannot request"):
        parse_request(entries, gpu_count)


def test_f09_alternatives_keep_their_order_and_the_best_card_comes_first() -> None:
    host = [
        card("NVIDIA GeForce RTX 4090", 0),
        card("NVIDIA RTX A6000", 1),
        card("NVIDIA A10G", 2),
        card("NVIDIA GeForce RTX 3090", 3),
    ]

    first, second = candidates(parse_request(["AMPERE_24", "ADA_24"], None), host)

    assert names(first) == [
        "NVIDIA GeForce RTX 3090",
        "NVIDIA A10G",
        "NVIDIA RTX A6000",
        "NVIDIA GeForce RTX 4090",
    ]
    assert names(second) == ["NVIDIA GeForce RTX 4090"]


def test_f09_mig_slices_serve_alone_and_never_together() -> None:
    slices = [device("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40192, (8, 0), index, uuid="MIG") for index in range(2)]

    assert candidates(parse_request(["AMPERE_24"], 1), slices) == [tuple(slices)]
    assert candidates(parse_request(["AMPERE_24"], 2), slices) == [()]
    assert serves("NVIDIA A100-SXM4-80GB", slices[0]) is None
    assert (explain_impossible(parse_request(["AMPERE_24"], 2), slices) or "").endswith("one MIG slice at most")


@pytest.mark.parametrize(
    ("entries", "host", "sentence"),
    [
        (
            ["AMPERE_80", "AMPERE_80"],
            ["NVIDIA GeForce RTX 3090 Ti"],
            "cannot serve 2 x AMPERE_80: this host has 1 x NVIDIA GeForce RTX 3090 Ti (24 GiB); "
            "ask for GpuGroup.ANY or for a card by the name above, at most 1",
        ),
        (
            ["ADA_24", "HOPPER_141"],
            ["NVIDIA RTX A6000", "NVIDIA RTX A6000", "NVIDIA GeForce GTX 1080"],
            "cannot serve 1 x ADA_24 or HOPPER_141: this host has 2 x NVIDIA RTX A6000 (45 GiB), "
            "1 x NVIDIA GeForce GTX 1080 (8 GiB); ask for GpuGroup.ANY or for a card by the name above",
        ),
        (
            ["AMPERE_24"] * 3,
            ["NVIDIA A40", "NVIDIA A40"],
            "cannot serve 3 x AMPERE_24: this host has 2 x NVIDIA A40 (45 GiB); ask for at most 2",
        ),
        (["ANY"], [], "cannot serve 1 x ANY: this host has no NVIDIA GPU"),
        (
            ["AMPERE_16"],
            ["Tesla T4"],
            "cannot serve 1 x AMPERE_16: this host has 1 x Tesla T4 (15 GiB); "
            "ask for GpuGroup.ANY or for a card by the name above",
        ),
    ],
)
def test_f09_a_refusal_names_what_was_asked_and_what_the_host_has(
    entries: list[str], host: list[str], sentence: str
) -> None:
    devices = [card(name, index) for index, name in enumerate(host)]

    assert explain_impossible(parse_request(entries, None), devices) == sentence


_entries = st.lists(st.sampled_from([*KNOWN_GROUPS, *CARDS]), min_size=1, max_size=5)
_hosts = st.lists(st.sampled_from(sorted(CARDS)), max_size=8).map(
    lambda drawn: [card(name, index) for index, name in enumerate(drawn)]
)
_counts = st.none() | st.integers(1, 4)


@given(_entries, _counts, _hosts)
def test_f09_candidates_are_exactly_the_devices_that_serve_best_first(
    entries: list[str], gpu_count: int | None, host: list[Device]
) -> None:
    request = parse_request(entries, gpu_count)

    tiers = candidates(request, host)

    assert len(tiers) == len(request.alternatives) == len(set(entries))
    for alternative, tier in zip(request.alternatives, tiers, strict=True):
        assert set(tier) == {one for one in host if serves(alternative, one) is not None}
        assert len(set(tier)) == len(tier)
        order = [(serves(alternative, one) or 0, one.memory_bytes, one.index) for one in tier]
        assert order == sorted(order)


@given(_entries, _counts, _hosts)
def test_f09_the_order_of_the_hosts_list_does_not_matter(
    entries: list[str], gpu_count: int | None, host: list[Device]
) -> None:
    request = parse_request(entries, gpu_count)

    assert candidates(request, host) == candidates(request, reversed(host))


@given(_entries, _counts, _hosts)
def test_f09_a_request_is_impossible_just_when_no_alternative_has_enough_devices(
    entries: list[str], gpu_count: int | None, host: list[Device]
) -> None:
    request = parse_request(entries, gpu_count)
    possible = any(len(tier) >= request.count for tier in candidates(request, host))

    sentence = explain_impossible(request, host)

    assert (sentence is None) == possible
    assert sentence is None or sentence.startswith(f"cannot serve {request.count} x {request.alternatives[0]}")


@given(_entries, _hosts, st.sampled_from(sorted(CARDS)))
def test_f09_another_card_never_makes_a_request_impossible(entries: list[str], host: list[Device], name: str) -> None:
    request = parse_request(entries, None)
    larger = [*host, card(name, len(host))]

    assert explain_impossible(request, host) is not None or explain_impossible(request, larger) is None


@given(_entries, _counts)
def test_f09_gpu_count_wins_over_repetition(entries: list[str], gpu_count: int | None) -> None:
    repeated = max(entries.count(entry) for entry in entries)

    assert parse_request(entries, gpu_count).count == (gpu_count or repeated)


@pytest.mark.parametrize(
    ("cuda_min", "supported"),
    [(None, (11, 8)), (None, None), ("12.4", None), ("12.4", (12, 4)), ("12.4", (12, 10)), ("12.4", (13, 0)), ("11.8", (12, 2)), ("9.2", (10, 0))],
)
def test_f30_a_driver_that_is_new_enough_or_silent_serves(cuda_min: str | None, supported: tuple[int, int] | None) -> None:
    assert explain_old_driver(cuda_min, supported) is None


@pytest.mark.parametrize(("cuda_min", "supported"), [("12.4", (12, 2)), ("13.0", (12, 9)), ("12.10", (12, 9)), ("12.4", (11, 8))])
def test_f30_a_driver_that_is_too_old_is_named_with_both_versions(cuda_min: str, supported: tuple[int, int]) -> None:
    assert explain_old_driver(cuda_min, supported) == (
        f"cannot serve the function: it needs CUDA {cuda_min}, this driver supports {supported[0]}.{supported[1]}; "
        "upgrade the driver or lower minCudaVersion"
    )


@pytest.mark.parametrize("cuda_min", ["", "12", "12.x", "12.4.1", "-1.0", "12.4\n", "1" * 5000 + ".0", "\u0661\u0662.\u0664"])
def test_f30_a_version_that_cannot_be_read_is_refused(cuda_min: str) -> None:
    sentence = explain_old_driver(cuda_min, (13, 0)) or ""

    assert sentence.startswith("cannot read minCudaVersion")
    assert len(sentence) < 120
