"""drain, resume: let nothing new begin, for an upgrade, a new driver, a reboot."""

from __future__ import annotations

import time
from typing import Any

import click

from remoted.cli import transport
from remoted.cli.absence import Absence
from remoted.cli.text import duration, print_json

_LOOK_SECONDS = 0.5
_json = click.option("--json", "as_json", is_flag=True, help="Print the daemon's document, with stable keys.")


@click.command()
@click.option("--refuse", is_flag=True, help="Turn new jobs away; without it durable jobs wait for `remotectl resume`.")
@click.option("--why", default="", metavar="TEXT", help="Tell everybody, e.g. 'new driver until 18:00'.")
@click.option("--wait", is_flag=True, help="Come back when nothing runs any more.")
@_json
def drain(refuse: bool, why: str, wait: bool, as_json: bool) -> int:
    """Begin nothing new; what runs goes on. Holds until `remotectl resume`, over restarts too."""
    document = transport.post("/v1/drain", {"refuse": refuse, "why": why})
    absence = Absence()
    absence.ends()
    while wait and document["drain"] is not None and document["running"]:
        time.sleep(_LOOK_SECONDS)
        document = absence.ask(lambda: transport.get("/v1/drain"))
    if as_json:
        print_json(document)
    else:
        print(_drained(document))
    return 0


def _drained(document: Any) -> str:
    if document["drain"] is None:
        return "somebody resumed meanwhile"
    fate = "new jobs are refused" if document["drain"]["refuses"] else f"{document['held']} jobs wait for `remotectl resume`"
    return f"drained: {document['running']} calls still run, {fate}"


@click.command()
@_json
def resume(as_json: bool) -> int:
    """End a drain: what waited begins."""
    document = transport.post("/v1/resume")
    if as_json:
        print_json(document)
    elif document["drain"] is None:
        print("nothing was drained")
    else:
        print(f"resumed after {duration(time.time() - document['drain']['since'])}: {document['held']} jobs may begin")
    return 0
