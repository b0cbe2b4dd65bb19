"""``remoted --user`` or ``remoted --system``: arguments, configuration, run."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import remoted

if TYPE_CHECKING:
    from remoted.paths import Paths

# Every socket of the daemon is a Unix socket and none speaks TLS. asyncio and aiohttp go without where there is none; it would take 4 MB.
sys.modules["ssl"] = None  # type: ignore[assignment]
#: What was imported in its absence: who imports these later, and cannot do without TLS (prometheus_client), gets them whole.
_WITHOUT_TLS = ("ssl", "http.client", "urllib.request")

#: Thousands of calls live at once and none of them is in a ring: looking for those took a tenth of the time.
_GC_THRESHOLD = (20_000, 20, 20)


def main() -> None:
    """Start a daemon in the foreground. Exit codes: 0 stopped or idle, 1 cannot start or go on, 2 usage."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.user == arguments.system:
        parser.error("say --user for a daemon of your own, or --system for one that serves everybody on this host")
    if arguments.system and not sys.flags.isolated:
        # Neither the current folder nor a variable says what root imports (T31).
        os.execv(sys.executable, [sys.executable, "-I", "-m", "remoted", *sys.argv[1:]])
    if importlib.util.find_spec("aiohttp") is None:
        parser.exit(1, f"remoted: the client alone is installed in {sys.prefix}; run: {sys.executable} -m pip install '.[daemon]' in the folder of remoted\n")
    from remoted.errors import SocketsLost, StartupError, StoreBroken

    try:
        (_check if arguments.check else _run)(arguments)
    except (StartupError, StoreBroken, SocketsLost) as error:
        _say(logging.ERROR, f"remoted: {error}")
        sys.exit(1)


def _check(arguments: argparse.Namespace) -> None:
    """Say what a start or a reload would say of the configuration: the unit's first step of a reload. Raises StartupError."""
    from remoted import config_files

    reading = config_files.read(arguments.config or _paths(arguments).config, is_shared=arguments.system).require()
    for problem in reading.problems:
        _say(logging.WARNING, f"remoted: warning: {problem}")


def _run(arguments: argparse.Namespace) -> None:
    import asyncio

    from remoted import app, config_files, house
    from remoted.settings import Settings

    for name in _WITHOUT_TLS:
        sys.modules.pop(name, None)

    found = _paths(arguments)
    file = arguments.config or found.config
    if arguments.system:
        house.prepare(file)
    reading = config_files.read(file, is_shared=arguments.system).require()
    _set_up_logging(arguments.log_file)
    for problem in reading.problems:
        logging.getLogger(__name__).warning("%s", problem)
    settings = Settings(reading)
    rules = house.system(settings.config) if arguments.system else house.own()
    idle = settings.limits.user_mode_idle_seconds if arguments.idle_exit else None
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLD)
    asyncio.run(app.Daemon(found, settings, idle, rules).run())


def _paths(arguments: argparse.Namespace) -> Paths:
    from remoted import paths

    return paths.system_paths(arguments.prefix) if arguments.system else paths.user_paths(dict(os.environ))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="remoted", description=remoted.__doc__)
    parser.add_argument("--user", action="store_true", help="serve the calling user, on sockets of their own")
    parser.add_argument("--system", action="store_true", help="serve every user of this host, as root, on /run/remoted")
    parser.add_argument("--prefix", type=Path, default=Path("/"), help="of --system: the folder in which its /run, /var/lib and /etc lie")
    parser.add_argument("--config", type=Path, help="configuration file (TOML)")
    parser.add_argument("--check", action="store_true", help="start nothing: only say whether it could live with its configuration")
    parser.add_argument("--idle-exit", action="store_true", help="of --user: end after 15 idle minutes (as when a first call starts it)")
    parser.add_argument("--log-file", type=Path, help="append the log to this file instead of standard error")
    parser.add_argument("--version", action="version", version=f"remoted {remoted.__version__}")
    return parser


def _set_up_logging(file: Path | None) -> None:
    handler: logging.Handler = logging.FileHandler(file) if file else logging.StreamHandler()
    handler.setFormatter((None if file else _journals_format("%(name)s: %(message)s")) or logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _say(level: int, text: str) -> None:
    """What is said before there is a log."""
    found = _journals_format("%(message)s")
    print(found.format(logging.makeLogRecord({"msg": text, "levelno": level})) if found else text, file=sys.stderr)


def _journals_format(layout: str) -> logging.Formatter | None:
    """If it reads our standard error."""
    from remoted.journal import LeveledLines, is_read_from

    return LeveledLines(layout) if is_read_from(sys.stderr.fileno(), os.environ) else None


if __name__ == "__main__":
    main()
