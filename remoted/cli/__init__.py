"""``remotectl``: the daemon from the command line. Talks HTTP to ``api.sock`` and nothing else to the daemon.

Exit codes: 0 done, 1 the job (or the command) failed, 2 usage, 3 no daemon, 4 not found, 130 Ctrl-C.
"""

from __future__ import annotations

import sys


def main() -> None:
    """``remotectl status`` has 100 ms; importing click alone takes a good part of them, so it goes past click."""
    from remoted.cli.ending import ending

    arguments = sys.argv[1:]
    if arguments in (["status"], ["status", "--json"]):
        from remoted.cli import overview

        sys.exit(ending(lambda: overview.show(as_json=len(arguments) == 2)))
    from remoted.cli.commands import run

    sys.exit(ending(lambda: run(arguments)))
