"""users: who waits, runs, and used how much."""

from __future__ import annotations

from typing import Any

import click

from remoted.cli import transport
from remoted.cli.text import duration, print_json, size, table, user_name


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the daemon's document, with stable keys.")
def users(as_json: bool) -> int:
    """Who waits, runs, and used how much: yourself and the others together; for an administrator everybody."""
    document = transport.get("/v1/users")
    if as_json:
        print_json(document)
        return 0
    rows = [_row(user) for user in document["users"]]
    if (others := document["others"]) is not None:
        uses = [duration(others[period][what]) for period in ("day", "week") for what in ("gpu_seconds", "cpu_seconds")]
        # What is used up may be of people who are not here now.
        rows.append([f"others ({others['users']} active)", str(others["queued"]), str(others["running"]), "", "", *uses, ""])
    print("\n".join(table(["USER", "QUEUED", "RUNNING", "WEIGHT", "SHARE", "GPU DAY", "CPU DAY", "GPU WEEK", "CPU WEEK", "DISK"], rows)))
    return 0


def _row(user: dict[str, Any]) -> list[str]:
    running = f"{user['running']} of {user['running_jobs']}" if user["running_jobs"] else str(user["running"])
    uses = [duration(user[period][what]) for period in ("day", "week") for what in ("gpu_seconds", "cpu_seconds")]
    disk = f"{size(user['stored_bytes'])} of {size(user['stored_bytes_limit'])}"
    return [user_name(user["uid"]), str(user["queued"]), running, str(user["weight"]), f"{user['share']:.0%}", *uses, disk]
