"""The table, and the facts beside it. Every ratio is a cost: below 1 is better, for rates too."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import Stats
from benchmarks.rows import Bench, Budget, Line

ROOT = Path(__file__).resolve().parent.parent
_SCALES = {"us": 1e6, "ms": 1e3, "MB": 1e-6, "%": 100.0, "jobs/s": 1.0}
#: Ours under whatever name, the floor, then whoever else took part.
_PEERS = ("pool", "loky", "ray", "ray task")


def line_of(bench: Bench, line: Line, found: dict[str, Stats]) -> dict[str, Any]:
    """One line of the table as numbers in the bench's base unit."""
    ours = _value(found[line.ours], line.stat)
    floor = _value(found["floor"], line.stat) if "floor" in found else None
    others = {name: _value(found[name], line.stat) for name in _PEERS if name in found}
    choose = max if bench.more_is_better else min
    best = choose(others, key=lambda name: others[name]) if others else None
    budget = _limit(line, found)
    return {
        "title": line.title,
        "bench": bench.name,
        "stat": line.stat,
        "unit": bench.unit,
        "shown": bench.shown,
        "ours": ours,
        "floor": floor,
        "peers": others,
        "best_peer": best,
        "budget": budget,
        "budget_text": _budget_text(bench, line.budget),
        "x_floor": _cost(bench, ours, floor),
        "x_best_peer": _cost(bench, ours, others[best] if best else None),
        "x_budget": _cost(bench, ours, budget),
    }


def _value(stats: Stats, stat: str) -> float:
    return float(getattr(stats, stat))


def _limit(line: Line, found: dict[str, Stats]) -> float | None:
    if line.budget is None:
        return None
    if line.budget.of == "floor":
        return line.budget.amount * found["floor"].p50
    return line.budget.amount


def _cost(bench: Bench, ours: float, other: float | None) -> float | None:
    if not other or not ours:
        return None
    return other / ours if bench.more_is_better else ours / other


def _budget_text(bench: Bench, budget: Budget | None) -> str:
    if budget is None:
        return "-"
    if budget.of:
        return f"{budget.amount:g} x {budget.of}"
    return f"{'>=' if bench.more_is_better else '<='} {number(budget.amount, bench.shown)} {bench.shown}"


# -- text --------------------------------------------------------------------------------------------------


def number(value: float | None, shown: str) -> str:
    if value is None:
        return "-"
    scaled = value * _SCALES[shown]
    return f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.3g}"


def table(lines: list[dict[str, Any]], asked: list[str], absent: list[str]) -> str:
    columns = [name for name in _PEERS if name in asked or any(name in line["peers"] for line in lines)]
    head = ["", "unit", "ours", "floor", *columns, "x floor", "x best peer", "budget", "x budget"]
    rows = [head]
    for line in lines:
        shown = line["shown"]
        others = ["not installed" if name in absent else number(line["peers"].get(name), shown) for name in columns]
        ratios = [_ratio(line["x_floor"]), _ratio(line["x_best_peer"], line["best_peer"])]
        rows.append([line["title"], shown, number(line["ours"], shown), number(line["floor"], shown), *others, *ratios, line["budget_text"], _ratio(line["x_budget"])])
    return _aligned(rows)


def _ratio(value: float | None, name: str | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" ({name})" if name else "")


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# -- facts -------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "processor": _processor_name(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
    }


def _processor_name() -> str:
    for row in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if row.startswith("model name"):
            return row.partition(":")[2].strip()
    return platform.machine()


def commit() -> dict[str, Any]:
    """Which code this is; ``changed`` when the working tree is not that commit."""
    return {"id": _git("rev-parse", "HEAD"), "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions(names: list[str]) -> dict[str, str]:
    """Of the peers and of what is measured with."""
    from importlib import metadata

    found: dict[str, str] = {}
    for name in ("remoted", "cloudpickle", "numpy", *(name for name in names if name != "pool")):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
