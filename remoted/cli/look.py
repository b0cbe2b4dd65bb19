"""status, top, gpus, workers: what is there and what it does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import click

from remoted.cli import overview, transport
from remoted.cli.absence import Absence
from remoted.cli.text import cell, duration, print_json, short, size, table

_json = click.option("--json", "as_json", is_flag=True, help="Print the daemon's document, with stable keys.")


@click.command()
@click.option("-w", "--watch", is_flag=True, help="Show it again every second.")
@_json
def status(watch: bool, as_json: bool) -> int:
    """GPUs and who uses them, pools, workers, what runs and what waits."""
    return overview.watch(as_json) if watch else overview.show(as_json)


@click.command()
@_json
def gpus(as_json: bool) -> int:
    """Every GPU, its holder, and processes outside the daemon."""
    document = transport.get("/v1/gpus")
    return _print(document, as_json, lambda: overview.gpu_lines(document["gpus"], document["problem"]))


@click.command()
@_json
def workers(as_json: bool) -> int:
    """Your workers: state, process, until when they stay; and the fork servers that bear them."""
    document = transport.get("/v1/workers")
    return _print(document, as_json, lambda: _worker_lines(document))


def _worker_lines(document: Any) -> list[str]:
    now = time.time()
    lines = overview.worker_lines(document["workers"], now) if document["workers"] else ["no worker is alive"]
    return [*lines, "", *overview.server_lines(document["fork_servers"], now)] if document["fork_servers"] else lines


def _print(document: Any, as_json: bool, lines: Callable[[], list[str]]) -> int:
    if as_json:
        print_json(document)
    else:
        print("\n".join(lines()))
    return 0


@click.command()
@click.option("--once", is_flag=True, help="One look of one second, then end.")
@_json
def top(once: bool, as_json: bool) -> int:
    """Your workers by the CPU that their processes use now."""
    absence = Absence()
    before = absence.ask(_measure)
    while True:
        overview.pause(1.0)
        now = absence.ask(_measure)
        rows = _differences(before, now)
        if as_json:
            print_json({"workers": rows})
            return 0
        if once:
            print("\n".join(_top_lines(rows)))
            return 0
        overview.print_frame(_top_lines(rows))
        before = now


def _measure() -> tuple[float, dict[str, dict[str, Any]]]:
    """(when, worker id -> worker with the CPU seconds and memory of its process tree)."""
    found = transport.get("/v1/workers")["workers"]
    parents = _children_by_parent() if found else {}
    measured = {}
    for worker in found:
        usage = [_usage(pid) for pid in _tree(worker["pid"], parents)] if worker["pid"] else []
        measured[worker["id"]] = {**worker, "cpu_seconds": sum(cpu for cpu, _ in usage), "resident_bytes": sum(rss for _, rss in usage)}
    return time.monotonic(), measured


def _children_by_parent() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))):
            found.setdefault(int(fields[1]), []).append(int(name))
    return found


def _tree(pid: int, children: dict[int, list[int]]) -> list[int]:
    return [pid, *(each for child in children.get(pid, []) for each in _tree(child, children))]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name (proc(5)), or none when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rsplit(")", 1)[1].split()
    except OSError:
        return []


def _usage(pid: int) -> tuple[float, int]:
    fields = _stat(pid)
    if not fields:
        return 0.0, 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def _differences(before: tuple[float, dict[str, Any]], now: tuple[float, dict[str, Any]]) -> list[dict[str, Any]]:
    elapsed = max(1e-3, now[0] - before[0])
    rows = []
    for worker_id, worker in now[1].items():
        earlier = before[1].get(worker_id, worker)
        rows.append({**worker, "cpu_percent": max(0.0, 100 * (worker["cpu_seconds"] - earlier["cpu_seconds"]) / elapsed)})
    return sorted(rows, key=lambda row: -float(row["cpu_percent"]))


def _top_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["no worker is alive"]
    return table(
        ["WORKER", "POOL", "STATE", "PID", "CPU", "MEMORY", "FOR", "RUNNING"],
        [
            [
                row["id"],
                cell(row["pool"]),
                row["state"],
                str(row["pid"]),
                f"{row['cpu_percent']:.0f}%",
                size(row["resident_bytes"]),
                duration(time.time() - row["since"]),
                " ".join(map(short, row["running"])),
            ]
            for row in rows
        ],
    )
