"""ps, show, cancel, retry: one's own jobs."""

from __future__ import annotations

import os
import time
from typing import Any
from urllib.parse import quote, urlencode

import click

from remoted.cli import overview, transport
from remoted.cli.ending import CliError, Refusal
from remoted.cli.text import cell, duration, escape, print_json, short, table

_STATUSES = ("IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
_PAGE = 1000
#: Answers to who asks for anybody's job and does not administer, or names nobody's; the last is an older daemon's.
_NOT_HIS = frozenset({"FORBIDDEN", "NOT_FOUND", "NO_ROUTE"})
_json = click.option("--json", "as_json", is_flag=True, help="Print documents with stable keys.")


def path_of(job: str, what: str = "") -> str:
    return f"/v1/jobs/{quote(job, safe='')}{what}"


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Finished ones too.")
@click.option("--status", "statuses", multiple=True, type=click.Choice(_STATUSES, case_sensitive=False), help="Only these, finished or not; may be given again.")
@click.option("--pool", default="", help="Only of the pool (config) of this name.")
@click.option("--name", default="", help="Only of this name, or pattern such as 'train*'.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many, the newest.")
@_json
def ps(everything: bool, statuses: tuple[str, ...], pool: str, name: str, limit: int, as_json: bool) -> int:
    """Your jobs, newest first."""
    found = _pages({"all": int(everything), "status": ",".join(statuses).upper(), "pool": pool, "name": name}, limit)
    if as_json:
        print_json({"jobs": found})
        return 0
    rows = [_row(job, time.time()) for job in found]
    print("\n".join(table(["JOB", "NAME", "POOL", "STATUS", "TRY", "AGE", "RUN", "WHY"], rows)) if rows else "no such job" if statuses or pool or name else "you have no jobs" if everything else "no job of yours is live; finished ones: ps -a")
    return 0


def _pages(wanted: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """As many as asked for, at most a thousand with each request."""
    found: list[dict[str, Any]] = []
    after = ""
    while len(found) < limit:
        size = min(_PAGE, limit - len(found))
        page = transport.get("/v1/jobs?" + urlencode({**wanted, "limit": size, "after": after}))["jobs"]
        found += page
        stored = [job["id"] for job in page if job["kind"] == "queue"]
        if len(page) < size or not stored:
            break
        after = stored[-1]
    return found


def _row(job: dict[str, Any], now: float) -> list[str]:
    return [
        short(job["id"]),
        cell(job["name"]),
        cell(job["pool"]),
        job["status"],
        str(job["attempts"]),
        duration(now - job["submitted_at"]),
        duration(job["run_seconds"]),
        cell(job["error"], 60) if job["error"] else overview.why(job),
    ]


@click.command()
@click.argument("job")
@_json
def show(job: str, as_json: bool) -> int:
    """Everything about one job and its attempts."""
    document = transport.get(path_of(job))
    if as_json:
        print_json(document)
        return 0
    print("\n".join(_detail_lines(document)))
    return 0


def _detail_lines(job: dict[str, Any]) -> list[str]:
    times = {name: _clock(job[f"{name}_at"]) for name in ("submitted", "started", "ended")}
    facts = {
        "id": job["id"],
        "name": job["name"],
        "function": job["function"],
        "pool": f"{job['pool']} ({job['kind']})",
        "status": job["status"],
        "why": overview.why(job),
        "place": str(job["position"] or ""),
        **times,
        "ran": duration(job["run_seconds"]),
        "worker": job["worker"],
        "gpus": " ".join(job["gpus"]),
        "items": str(job["items"] or ""),
        "parent": job["parent"],
        "error": job["error"],
    }
    lines = [f"{name + ':':<11}{escape(value)}" for name, value in facts.items() if value]
    if job["attempt_list"]:
        rows = [_attempt_row(attempt) for attempt in job["attempt_list"]]
        lines += ["", *table(["TRY", "WORKER", "PID", "GPUS", "STARTED", "RAN", "OUTCOME", "MESSAGE"], rows)]
    if job["traceback"]:
        lines += ["", escape(job["traceback"].rstrip())]
    return lines


def _attempt_row(attempt: dict[str, Any]) -> list[str]:
    ran = (attempt["ended_at"] or time.time()) - attempt["started_at"]
    return [
        str(attempt["number"]),
        attempt["worker"],
        str(attempt["pid"]),
        cell(",".join(attempt["gpus"])),
        _clock(attempt["started_at"]),
        duration(ran),
        cell(attempt["outcome"] or "runs"),
        cell(attempt["message"], 80),
    ]


def _clock(moment: float | None) -> str:
    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


@click.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@_json
def cancel(jobs: tuple[str, ...], as_json: bool) -> int:
    """Stop jobs: interrupt, then TERM, then KILL within ten seconds. An administrator may stop anybody's (`status` has the ids)."""
    answers, worst = [], 0
    for job in jobs:
        try:
            answers.append(_cancel(job))
        except Refusal as error:  # the others are to be stopped all the same
            click.echo(f"remotectl: {escape(str(error))}", err=True)
            worst = max(worst, error.exit_code)
    if as_json:
        print_json({"jobs": answers})
    else:
        for answer in answers:
            print(f"{answer['id']}: " + ("cancelling" if answer["cancelling"] else f"over already ({answer['status']})"))
    return worst


def _cancel(job: str) -> dict[str, Any]:
    """One's own; and if there is none, as who administers. Whoever does not hears no more than before."""
    try:
        return dict(transport.post(path_of(job, "/cancel")))
    except Refusal as error:
        if error.code != "NOT_FOUND":
            raise
        try:
            return dict(transport.post(path_of(job, "/end")))
        except Refusal as other:
            raise (error if other.code in _NOT_HIS else other) from None


@click.command()
@click.argument("job")
@_json
def retry(job: str, as_json: bool) -> int:
    """Submit a finished job again, with this shell's environment. Prints the new id."""
    answer = transport.post(path_of(job, "/retry"), {"environ": _environ()})
    if as_json:
        print_json(answer)
    else:
        print(answer["id"])
    return 0


def _environ() -> dict[str, str]:
    """This environment as JSON can carry it."""
    found = dict(os.environ)
    for name, value in found.items():
        try:
            (name + value).encode("utf-8")
        except UnicodeEncodeError:
            raise CliError(f"cannot send the variable {name!a}: it is not UTF-8; unset it first") from None
    return found
