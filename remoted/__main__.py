"""``remoted --user`` or ``python -m remoted --user``: arguments, configuration, run."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

import remoted
from remoted.errors import StartupError, StoreBroken


def main() -> None:
    """Start a daemon in the foreground. Exit codes: 0 stopped or idle, 1 cannot start or go on, 2 usage."""
    arguments = _parser().parse_args()
    if not arguments.user:
        _parser().error("say --user: this version has user mode only")
    from remoted import app, config, paths

    found = paths.user_paths(dict(os.environ))
    try:
        settings = config.load(arguments.config or found.config)
        _set_up_logging(arguments.log_file)
        idle = settings.build_limits().user_mode_idle_seconds if arguments.idle_exit else None
        asyncio.run(app.Daemon(found, settings, idle).run())
    except (StartupError, StoreBroken) as error:
        print(f"remoted: {error}", file=sys.stderr)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="remoted", description=remoted.__doc__)
    parser.add_argument("--user", action="store_true", help="serve the calling user, on sockets of their own")
    parser.add_argument("--config", type=Path, help="configuration file (TOML)")
    parser.add_argument("--idle-exit", action="store_true", help="end after 15 idle minutes (as when a first call starts it)")
    parser.add_argument("--log-file", type=Path, help="append the log to this file instead of standard error")
    parser.add_argument("--version", action="version", version=f"remoted {remoted.__version__}")
    return parser


def _set_up_logging(file: Path | None) -> None:
    handler: logging.Handler = logging.FileHandler(file) if file else logging.StreamHandler()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[handler])


if __name__ == "__main__":
    main()
