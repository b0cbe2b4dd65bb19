"""``remotectl``: the daemon from the command line. Talks HTTP to ``api.sock`` and nothing else to the daemon.

Exit codes: 0 done, 1 the job (or the command) failed, 2 usage, 3 no daemon, 4 not found, 130 Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import NoReturn


def main() -> None:
    """``remotectl status`` has 100 ms; importing click alone takes a good part of them, so it goes past click."""
    from remoted.cli.ending import ending

    arguments = sys.argv[1:]
    if arguments in (["status"], ["status", "--json"]):
        from remoted.cli import overview

        sys.exit(ending(lambda: overview.show(as_json=len(arguments) == 2)))
    if importlib.util.find_spec("click") is None:
        sys.exit(ending(lambda: _go_to_the_hosts(arguments)))
    from remoted.cli.commands import run

    sys.exit(ending(lambda: run(arguments)))


def _go_to_the_hosts(arguments: list[str]) -> NoReturn:
    """Where the client alone is installed, the command of the system's daemon stands behind this one. Raises CliError without it.

    Not for ``serve``: the script's imports are in this interpreter.
    """
    from remoted.cli import editions
    from remoted.cli.ending import CliError

    command = os.fspath(editions.PREFIX / "bin" / "remotectl")
    add = f"run: {sys.executable} -m pip install '.[daemon]' in the folder of remoted"
    if arguments[:1] == ["serve"]:
        raise CliError(f"cannot serve a script by the host's remotectl, which has not what the script imports, and {sys.prefix} has the client alone; {add}")
    if not os.access(command, os.X_OK) or sys.prefix == os.path.realpath(editions.PREFIX):
        raise CliError(f"the client alone is installed in {sys.prefix}, and no system's daemon on this host; for this command {add}")
    os.execv(command, [command, *arguments])
