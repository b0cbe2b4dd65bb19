"""env, config, doctor, stop, version, completion: the installation itself."""

from __future__ import annotations

import os
import select
import sys
import time
from pathlib import Path

import click

import remoted
from remoted.cli import transport
from remoted.cli.ending import CliError, NoDaemon
from remoted.cli.text import cell, duration, escape, paint, print_json, short, size, table

_STOP_SECONDS = 30.0
_json = click.option("--json", "as_json", is_flag=True, help="Print documents with stable keys.")


@click.group()
def env() -> None:
    """Environments that `dependencies=` made."""


@env.command("list")
@_json
def env_list(as_json: bool) -> int:
    """What lies there, the one used last first."""
    document = transport.get("/v1/environments", timeout=120.0)
    if as_json:
        print_json(document)
        return 0
    now = time.time()
    rows = [
        [short(entry["key"]), size(entry["size_bytes"]), duration(now - entry["last_used"]), cell(" ".join(entry["requirements"]), 100)]
        for entry in document["environments"]
    ]
    print("\n".join(table(["ENVIRONMENT", "SIZE", "UNUSED FOR", "PACKAGES"], rows)) if rows else "there is no environment")
    return 0


@env.command("prune")
@click.option("--unused", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Days since the last use.")
@_json
def env_prune(unused: float, as_json: bool) -> int:
    """Remove environments that nobody used; those of the running daemon stay."""
    document = transport.post("/v1/environments/prune", {"unused_seconds": unused * 86_400})
    if as_json:
        print_json(document)
    else:
        print(f"removed {len(document['removed'])} environments")
    return 0


@click.group(invoke_without_command=True)
@_json
@click.pass_context
def config(context: click.Context, as_json: bool) -> int:
    """The daemon's configuration; by itself, what is in force."""
    return _show_config(as_json) if context.invoked_subcommand is None else 0


@config.command("show")
@_json
def config_show(as_json: bool) -> int:
    """What is in force, defaults included."""
    return _show_config(as_json)


def _show_config(as_json: bool) -> int:
    from remoted.cli import configuration

    document = transport.get("/v1/config")
    if as_json:
        print_json(document)
        return 0
    print(f"# {escape(document['file'])}")
    if document["at_restart"]:
        print(f"# after a restart something else holds for: {escape(', '.join(document['at_restart']))}")
    print(escape("\n".join(configuration.in_force(document["config"], document["limits"]))))
    return 0


@config.command("defaults")
@_json
def config_defaults(as_json: bool) -> int:
    """Every setting that there is, explained, with its value where no file says another one: a file that could be used as it is."""
    from remoted import config_files
    from remoted.cli import configuration
    from remoted.cli.checks import configured
    from remoted.config import Config

    _, is_shared = configured()
    if as_json:
        print_json({"config": Config().model_dump(mode="json", exclude={"limits"}), "limits": config_files.default_limits(is_shared).values()})
    else:
        print("\n".join(configuration.defaults(is_shared)))
    return 0


@config.command("check")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@_json
def config_check(file: Path | None, as_json: bool) -> int:
    """Say whether the daemon would take FILE and the conf.d beside it (default: those that it reads)."""
    from remoted import config_files, settings
    from remoted.cli.checks import configured

    path, is_shared = (file, False) if file is not None else configured()
    if file is not None and not path.exists():
        raise CliError(f"cannot read {path}: there is no such file")
    found = config_files.read(path, is_shared)
    later = [key for key in found.keys if not settings.is_live(key)]
    problem = "\n".join(map(str, found.problems)) if found.fatal else ""
    if as_json:
        problems = [{"file": str(each.file), "key": each.key, "reason": each.reason, "fatal": each.fatal} for each in found.problems]
        named = {"file": str(path), "exists": path.exists(), "files": [str(each) for each in found.files]}
        print_json({**named, "good": not problem, "problem": problem, "problems": problems, "at_restart": later})
        return int(bool(problem))
    if problem:
        raise CliError(problem)
    for each in found.problems:
        print(f"remotectl: warning: {escape(str(each))}", file=sys.stderr)
    print("\n".join(f"{escape(str(each))}: good" for each in found.files) or f"{escape(str(path))}: not there, so the defaults hold")
    if later:
        print(f"a reload changes everything but: {escape(', '.join(later))}")
    return 0


@click.command()
@_json
def doctor(as_json: bool) -> int:
    """Check this host and the daemon; works without a daemon too."""
    from remoted.cli import checks

    found = checks.run()
    if as_json:
        print_json({"checks": found})
    else:
        for check in found:
            mark = paint("BAD ", "red") if not check["ok"] else paint("warn", "yellow") if check.get("warning") else paint("ok  ", "green")
            advice = f"\n       {escape(check['advice'])}" if check["advice"] else ""
            print(f"{mark} {check['name'] + ':':<14} {escape(check['detail'])}{advice}")
    return 0 if all(check["ok"] for check in found) else 1


@click.command()
@click.option("--now", is_flag=True, help="End running jobs too (CANCELLED, DAEMON_STOPPED).")
@_json
def stop(now: bool, as_json: bool) -> int:
    """End the daemon. Running jobs go on and queued ones stay: the next daemon, which the next call starts, takes them over."""
    answer = transport.post("/v1/stop", {"now": now})
    if not _has_ended(answer["pid"], _STOP_SECONDS):
        raise CliError(f"the daemon (pid {answer['pid']}) still ends after {_STOP_SECONDS:g} s; its log may say why")
    if as_json:
        print_json(answer)
        return 0
    jobs = f"{answer['running']} running job{'' if answer['running'] == 1 else 's'}"
    fate = "" if not answer["running"] else f"; {jobs} ended with it" if now else f"; {jobs} will be taken over by the next one"
    back = "; the next call starts it again, `systemctl disable --now remoted.socket remoted.service` keeps it away" if transport.socket_directory() == transport.SYSTEM_DIRECTORY else ""
    print(f"the daemon (pid {answer['pid']}) has ended{fate}{back}")
    return 0


def _has_ended(pid: int, seconds: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], seconds)[0])
    finally:
        os.close(pidfd)


@click.command()
@_json
def version(as_json: bool) -> int:
    """The versions of this program and of the daemon."""
    try:
        daemon = transport.get("/v1/version")
    except NoDaemon:
        daemon = None
    if as_json:
        print_json({"version": remoted.__version__, "daemon": daemon})
    else:
        answering = f"daemon {daemon['version']} (pid {daemon['pid']})" if daemon else "no daemon answers"
        print(f"remotectl {remoted.__version__}; {answering}")
    return 0


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print what SHELL needs to complete remotectl, e.g. `eval "$(remotectl completion bash)"`."""
    from click.shell_completion import get_completion_class

    from remoted.cli.commands import remotectl

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(remotectl, {}, "remotectl", "_REMOTECTL_COMPLETE").source())
    return 0
