"""The command line: choose, measure in turns, print, keep."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import ours, peers, report
from benchmarks.measure import QUICK, Scale, Stats, interleave
from benchmarks.rows import BENCHES, Bench, Setting

SCHEMA = 1
#: More than this share of the cores was busy with something else before we began.
_QUIET_SHARE = 0.1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument("--peers", default=",".join(peers.NAMES), help="who else takes part (%(default)s)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=f"these benches: {', '.join(bench.name for bench in BENCHES)}; the beginning of a name will do")
    parser.add_argument("--repeat", type=int, metavar="N", help="rounds of every bench")
    parser.add_argument("--jobs", type=int, metavar="N", help=f"calls in one map ({Scale.jobs})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result here")
    parser.add_argument("--note", default="", help="a sentence for the JSON, e.g. about what else ran")
    parser.add_argument("--quick", action="store_true", help="tiny counts: tests the harness, measures nothing")
    options = parser.parse_args(arguments)
    options.peers = [name for name in options.peers.split(",") if name]
    unknown = [name for name in options.peers if name not in peers.NAMES]
    if unknown or not chosen(options.only):
        parser.error(f"unknown peer {unknown[0]!r}" if unknown else f"no bench is called {options.only}")
    return options


def chosen(only: list[str]) -> list[Bench]:
    wanted = [name for part in only for name in part.split(",")]
    return [bench for bench in BENCHES if not wanted or any(bench.name.startswith(name) for name in wanted)]


def scale_of(options: argparse.Namespace) -> Scale:
    scale = QUICK if options.quick else Scale()
    if options.repeat:
        rounds = dict.fromkeys(("rounds", "map_rounds", "cold_rounds", "array_rounds", "command_rounds"), options.repeat)
        scale = dataclasses.replace(scale, **rounds)
    return dataclasses.replace(scale, jobs=options.jobs) if options.jobs else scale


def run(bench: Bench, host: ours.BenchHost, functions: ours.Functions, scale: Scale, present: list[str]) -> tuple[dict[str, Stats], dict[str, Any]]:
    """One bench, opened and closed again; (figures, notes)."""
    with contextlib.ExitStack() as stack:
        setting = Setting(host, functions, scale, present, stack)
        contenders = bench.open(setting)
        return interleave(contenders, bench.rounds(scale)), setting.notes


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, as the document that is kept."""
    scale, began = scale_of(options), time.perf_counter()
    absent = [name for name in options.peers if peers.missing(name)]
    present = [name for name in options.peers if name not in absent]
    document = _facts(options, scale, absent)
    with ours.daemon() as host, contextlib.ExitStack() as stack:
        stack.callback(peers.stop_all)
        functions = ours.Functions()
        for bench in chosen(options.only):
            sys.stderr.write(f"{bench.title} ...\n")
            found, notes = run(bench, host, functions, scale, present)
            document["benches"][bench.name] = {
                "title": bench.title, "unit": bench.unit, "contenders": {name: stats.as_json() for name, stats in found.items()}, "notes": notes,
            }
            document["lines"] += [report.line_of(bench, line, found) for line in bench.lines]
    document["load_after"] = list(os.getloadavg())
    document["seconds"] = round(time.perf_counter() - began, 1)
    return document


def _facts(options: argparse.Namespace, scale: Scale, absent: list[str]) -> dict[str, Any]:
    load = list(os.getloadavg())
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": report.machine(),
        "machine_was_quiet": load[0] < _QUIET_SHARE * (os.cpu_count() or 1),
        "note": options.note,
        "commit": report.commit(),
        "versions": report.versions(options.peers),
        "scale": dataclasses.asdict(scale),
        "quick": options.quick,
        "peers": {name: "not installed" if name in absent else peers.TITLES[name] for name in options.peers},
        "load_before": load,
        "load_after": load,
        "seconds": 0.0,
        "benches": {},
        "lines": [],
    }


def text(document: dict[str, Any]) -> str:
    absent = [name for name, state in document["peers"].items() if state == "not installed"]
    facts, commit = document["machine"], document["commit"]
    quiet = "quiet" if document["machine_was_quiet"] else "NOT QUIET"
    return "\n".join(
        [
            report.table(document["lines"], list(document["peers"]), absent),
            "",
            "ratios are costs: below 1 is better, for jobs/s too; medians unless the line says p99",
            f"{facts['cores']} cores ({facts['processor']}), Python {facts['python']}, Linux {facts['kernel']}, commit {commit['id'][:10]}{' + changes' if commit['changed'] else ''}",
            f"machine {quiet}: load average {document['load_before'][0]:.2f} before, {document['load_after'][0]:.2f} after; {document['seconds']:g} s"
            + ("; --quick: these are no measurements" if document["quick"] else ""),
        ]
    )


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    document = measure(options)
    print(text(document))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0
