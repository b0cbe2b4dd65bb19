"""The benchmark harness runs from end to end, and its table and JSON have their shape. No figure is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import command, report
from benchmarks.measure import Contender, interleave, summarize
from benchmarks.rows import BENCHES
from tests.harness import ROOT

RATIOS = ("x_floor", "x_best_peer", "x_budget")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """(what it printed, what it kept) of one run with tiny counts."""
    kept = tmp_path_factory.mktemp("bench") / "result.json"
    command_line = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--quick", "--peers", "pool,loky", "--json", str(kept)]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(kept.read_text(encoding="utf-8"))


def test_every_line_is_in_the_table_with_every_column(quick: tuple[str, dict[str, Any]]) -> None:
    table = quick[0].split("\n\n")[0].splitlines()
    assert table[0].split() == ["unit", "ours", "floor", "pool", "loky", "x", "floor", "x", "best", "peer", "budget", "x", "budget"]
    titles = [line.title for bench in BENCHES for line in bench.lines]
    assert [row.split("  ")[0] for row in table[2:]] == titles
    assert len({len(row) for row in table}) == 1, "the columns are aligned"
    assert "--quick: these are no measurements" in quick[0]


def test_the_json_has_every_bench_contender_and_fact(quick: tuple[str, dict[str, Any]]) -> None:
    document = quick[1]
    assert document["schema"] == command.SCHEMA
    assert document["quick"] is True
    assert set(document["benches"]) == {bench.name for bench in BENCHES}
    assert set(document["benches"]["latency"]["contenders"]) == {"direct", "method", "queue", "floor", "anywhere", "pool", "loky"}
    for bench in document["benches"].values():
        for stats in bench["contenders"].values():
            assert stats["n"] >= 1
            assert stats["min"] <= stats["p50"] <= stats["p99"] <= stats["max"]
            assert stats["round_medians"]
    assert {"cores", "python", "kernel", "processor", "memory_bytes"} <= set(document["machine"])
    assert {"date", "commit", "versions", "scale", "note", "machine_was_quiet", "load_before", "load_after", "seconds"} <= set(document)
    assert str(Path.home()) not in json.dumps(document), "a kept result names no folder of this machine"


def test_every_line_of_the_json_has_its_ratios(quick: tuple[str, dict[str, Any]]) -> None:
    lines = {line["title"]: line for line in quick[1]["lines"]}
    direct = lines["no-op, load-balanced, p50"]
    assert direct["x_floor"] == pytest.approx(direct["ours"] / direct["floor"])
    assert direct["x_budget"] == pytest.approx(direct["ours"] / (1.6 * direct["floor"]))
    assert direct["x_best_peer"] == pytest.approx(direct["ours"] / min(direct["peers"].values()))
    rate = lines["map, durable queue"]
    assert rate["x_best_peer"] == pytest.approx(max(rate["peers"].values()) / rate["ours"]), "a rate's ratio is a cost, too"
    assert all(line[name] is None or line[name] > 0 for line in lines.values() for name in RATIOS)


def test_an_absent_peer_has_a_column_that_says_so() -> None:
    line = {"title": "a row", "shown": "us", "ours": 1e-6, "floor": None, "peers": {"pool": 2e-6}, "best_peer": "pool", "budget_text": "-", "x_floor": None, "x_best_peer": 0.5, "x_budget": None}
    text = report.table([line], ["pool", "ray"], ["ray"])
    assert "ray" in text.splitlines()[0]
    assert "not installed" in text.splitlines()[2]


def test_contenders_take_turns_and_every_round_begins_with_another() -> None:
    turns: list[str] = []

    def sampler(name: str) -> Contender:
        return Contender(name, lambda: [float(len(turns)), float(turns.append(name) or 1)])

    found = interleave([sampler(name) for name in "abc"], 3)
    assert "".join(turns) == "abcbcacab"
    assert found["a"].n == 6
    assert len(found["a"].rounds) == 3


def test_the_percentile_is_a_sample() -> None:
    stats = summarize([[float(number) for number in range(1, 101)], [1000.0]])
    assert (stats.low, stats.p50, stats.p99, stats.high, stats.n) == (1.0, 51.0, 100.0, 1000.0, 101)


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--peers", "dask"]])
def test_an_unknown_name_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.parse(arguments)
    assert ended.value.code == 2
