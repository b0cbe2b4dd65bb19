"""What ``remotectl status`` shows. No click here: this is the path that has 100 ms."""

from __future__ import annotations

import os
import select
import sys
import time
from typing import Any

from remoted.cli import transport
from remoted.cli.text import cell, duration, paint, print_json, print_json_line, short, size, table, user_name

Document = dict[str, Any]


def show(as_json: bool) -> int:
    document = transport.get("/v1/status")
    if as_json:
        print_json(document)
    else:
        print("\n".join(lines(document)))
    return 0


def watch(as_json: bool, seconds: float = 1.0) -> int:
    """Again and again until Ctrl-C; a terminal is redrawn, anything else gets one block (or JSON line) after another."""
    from remoted.cli.absence import Absence

    absence = Absence()
    while True:
        document = absence.ask(lambda: transport.get("/v1/status"))
        if as_json:
            print_json_line(document)
        else:
            print_frame(lines(document))
        pause(seconds)


def print_frame(shown: list[str]) -> None:
    """One of many: over the last one on a terminal, else behind it."""
    print("\x1b[H\x1b[2J" + "\n".join(shown) if sys.stdout.isatty() else "\n".join([*shown, ""]), flush=True)


def pause(seconds: float) -> None:
    """Raises BrokenPipeError as soon as whoever reads our output has left: there is nobody to go on for."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)  # errors are always told
    if poller.poll(seconds * 1000):
        raise BrokenPipeError("nobody reads the output")


def lines(document: Document) -> list[str]:
    now = time.time()
    blocks = [_head(document), gpu_lines(document["gpus"], document["gpu_problem"])]
    if document["pools"]:
        blocks.append(_pool_lines(document["pools"], now))
    if document["workers"]:
        blocks.append(worker_lines(document["workers"], now))
    if document["fork_servers"]:
        blocks.append(server_lines(document["fork_servers"], now))
    if document["running"]:
        blocks.append(_running_lines(document["running"], now))
    if document["queue"]:
        blocks.append(_queue_lines(document, now))
    if document["others"]:
        blocks.append(_others_lines(document["others"], now))
    return [line for block in blocks for line in (*block, "")][:-1]


def _head(document: Document) -> list[str]:
    daemon, counts = document["daemon"], document["counts"]
    draining = paint(f"; {_draining(daemon['drain'])}", "yellow") if daemon["draining"] else ""
    return [
        f"remoted {daemon['version']}, {daemon['mode']} mode, pid {daemon['pid']}, up {duration(daemon['uptime_seconds'])}{draining}",
        f"{counts['running']} running{_of_others(document, 'IN_PROGRESS')}, {counts['queued']} queued{_of_others(document, 'IN_QUEUE')}, {_workers(document)}, {counts['cpus_used']:g} of {counts['cpus']:g} CPUs reserved",
    ]


def _of_others(document: Document, status: str) -> str:
    """As many as are told of."""
    count = sum(call["status"] == status for call in document["others"])
    return f" (and {count} of others)" if count else ""


def _workers(document: Document) -> str:
    """Those of others are no rows here, but have their share of the CPUs."""
    own = len(document["workers"])
    others = document["counts"]["workers"] - own
    return f"{own} worker{'' if own == 1 else 's'}" + (f" (and {others} of others)" if others > 0 else "")


def _draining(drain: Document | None) -> str:
    if drain is None:
        return "takes no new work"
    why = f" ({cell(drain['why'], 200)})" if drain["why"] else ""
    return f"drained{why}: nothing new begins" + (", new jobs are refused" if drain["refuses"] else "")


def gpu_lines(gpus: list[Document], problem: str) -> list[str]:
    if not gpus:
        return [f"no GPU is known{': ' + cell(problem, 200) if problem else ''}"]
    rows = [
        [
            str(gpu["index"]),
            cell(gpu["name"]),
            f"{size(gpu['memory_used_bytes'])} of {size(gpu['memory_bytes'])}",
            "?" if gpu["utilization_percent"] is None else f"{gpu['utilization_percent']}%",
            _used_by(gpu),
        ]
        for gpu in gpus
    ]
    return table(["GPU", "NAME", "MEMORY", "USE", "USED BY"], rows) + ([cell(problem, 200)] if problem else [])


def _used_by(gpu: Document) -> str:
    users = []
    if holder := gpu["holder"]:
        pool = f" ({cell(holder['pool'])})" if holder["pool"] else ""
        own = holder["worker"] and holder["uid"] == os.getuid()
        whose = " ".join(filter(None, ["" if own else user_name(holder["uid"]), holder["worker"]])) + pool
        users.append(" ".join([whose, *map(short, holder["jobs"])]))
    if gpu["free"]:  # a desktop may draw on it all the same
        users.append("free")
    users += [f"outside: {_process(process)}" for process in gpu["foreign"]]
    return ", ".join(users) or "kept back"


def _process(process: Document) -> str:
    if not process["pid"]:
        return "a process that cannot be seen from here"
    who = f" of uid {process['uid']}" if process["uid"] is not None else ""
    return f"pid {process['pid']} {cell(process['command'])}{who}"


def _pool_lines(pools: list[Document], now: float) -> list[str]:
    rows = [
        [
            cell(pool["name"]),
            pool["config_class"],
            _workers_of(pool),
            str(pool["busy"]),
            str(pool["idle"]),
            str(pool["queued"]),
            duration(pool["idle_timeout_seconds"]),
            duration(pool["held_until"] - now) if pool["held_until"] else "as long as used" if pool["held"] else "",
        ]
        for pool in pools
    ]
    return table(["POOL", "CLASS", "WORKERS", "BUSY", "IDLE", "QUEUED", "IDLE TIMEOUT", "HELD FOR"], rows)


def _workers_of(pool: Document) -> str:
    """A body that waits for a nested call of its own pool gets another worker, which stays for its idle time."""
    shown = f"{pool['workers']} of {pool['workers_min']}..{pool['workers_max']}"
    extra = pool["workers"] - pool["workers_max"]
    return f"{shown} ({extra} for nested calls)" if extra > 0 else shown


def worker_lines(workers: list[Document], now: float) -> list[str]:
    rows = [
        [
            worker["id"],
            cell(worker["pool"]),
            worker["state"],
            str(worker["pid"] or ""),
            worker["python"],
            str(worker["calls_done"]),
            _gpus(worker["gpus"]),
            worker["start"],
            str(worker["leftovers"] or ""),
            _doing(worker, now),
        ]
        for worker in workers
    ]
    lines = table(["WORKER", "POOL", "STATE", "PID", "PYTHON", "CALLS", "GPUS", "START", "LEFTOVERS", "DOING"], rows)
    reasons = dict.fromkeys(worker["start_reason"] for worker in workers if worker["start_reason"])
    return lines + [f"plain start: {cell(reason, 200)}" for reason in reasons]


def server_lines(servers: list[Document], now: float) -> list[str]:
    """Copy-on-write: what is shared is there once, however many workers have it."""
    rows = [
        [
            server["id"],
            server["state"],
            str(server["pid"] or ""),
            str(server["births"]),
            _memory(server["memory"]),
            duration(now - server["used_at"]),
            cell(" ".join([*server["preload"], *(f"({name})" for name in server["inferred"])]), 80),
        ]
        for server in servers
    ]
    return table(["FORK SERVER", "STATE", "PID", "WORKERS", "MEMORY", "UNUSED FOR", "PRELOAD (INFERRED)"], rows)


def _memory(memory: Document | None) -> str:
    return f"{size(memory['resident'])}, {size(memory['shared'])} shared copy-on-write" if memory else ""


def _doing(worker: Document, now: float) -> str:
    if worker["running"]:
        return " ".join(map(short, worker["running"]))
    if worker["idle_until"] is not None:
        return f"ends in {duration(worker['idle_until'] - now)} if idle"
    return f"for {duration(now - worker['since'])}"


def _gpus(uuids: list[str]) -> str:
    return ",".join(uuid[:12] for uuid in uuids)


def _running_lines(jobs: list[Document], now: float) -> list[str]:
    rows = [
        [
            short(job["id"]),
            cell(job["name"]),
            cell(job["pool"]),
            job["worker"],
            _gpus(job["gpus"]),
            str(job["attempts"]),
            duration(now - (job["started_at"] or now)),
        ]
        for job in jobs
    ]
    return table(["RUNNING", "NAME", "POOL", "WORKER", "GPUS", "TRY", "FOR"], rows)


def _queue_lines(document: Document, now: float) -> list[str]:
    rows = [
        [
            short(job["id"]),
            cell(job["name"]),
            cell(job["pool"]),
            str(job["position"] or "-"),
            duration(now - job["submitted_at"]),
            why(job),
        ]
        for job in document["queue"]
    ]
    left = document["counts"]["queued"] - len(rows)
    return table(["QUEUED", "NAME", "POOL", "PLACE", "FOR", "WAITS FOR"], rows) + ([f"and {left} more"] if left > 0 else [])


def _others_lines(calls: list[Document], now: float) -> list[str]:
    """Ids are there for an administrator, who may cancel what has one; the worker's is its scope's too (remoted-WORKER.scope)."""
    shown = [[short(call["id"]), call["worker"], str(call["pid"] or "")] for call in calls] if any(call["id"] for call in calls) else [[] for _ in calls]
    rows = [
        [
            user_name(call["uid"]),
            cell(call["name"]),
            cell(call["pool"]),
            call["status"],
            _gpus(call["gpus"]),
            duration(now - (call["started_at"] or call["submitted_at"])),
            *more,
        ]
        for call, more in zip(calls, shown, strict=True)
    ]
    return table(["OTHERS", "NAME", "POOL", "STATE", "GPUS", "FOR", *(["JOB", "WORKER", "PID"] if shown[0] else [])], rows)


def why(job: Document) -> str:
    """Why a job waits, or how it ended."""
    reason, detail = str(job["state_reason"]), cell(job["detail"], 100)
    return f"{reason}: {detail}" if detail else reason
