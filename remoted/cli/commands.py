"""The table of commands; each is imported when it is used."""

from __future__ import annotations

import difflib
import importlib

import click

from remoted.cli.ending import INTERRUPTED

_COMMANDS = {
    "status": "remoted.cli.look",
    "top": "remoted.cli.look",
    "gpus": "remoted.cli.look",
    "workers": "remoted.cli.look",
    "users": "remoted.cli.users",
    "ps": "remoted.cli.jobs",
    "show": "remoted.cli.jobs",
    "cancel": "remoted.cli.jobs",
    "retry": "remoted.cli.jobs",
    "logs": "remoted.cli.following",
    "wait": "remoted.cli.following",
    "run": "remoted.cli.running",
    "serve": "remoted.cli.serving",
    "env": "remoted.cli.system",
    "config": "remoted.cli.system",
    "doctor": "remoted.cli.system",
    "drain": "remoted.cli.draining",
    "resume": "remoted.cli.draining",
    "stop": "remoted.cli.system",
    "version": "remoted.cli.system",
    "completion": "remoted.cli.system",
    "install": "remoted.cli.install",
    "uninstall": "remoted.cli.install",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):
            close = difflib.get_close_matches(name, _COMMANDS, 1)
            ctx.fail(f"there is no command {name!r}; " + (f"did you mean {close[0]!r}?" if close else "--help lists them"))
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        found: click.Command = getattr(importlib.import_module(_COMMANDS[cmd_name]), cmd_name)
        return found


def _print_version(context: click.Context, option: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        from remoted.cli.system import version

        context.exit(context.invoke(version, as_json=False))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="The versions of this program and of the daemon.")
def remotectl() -> None:
    """See and steer the daemon that runs your functions. JOB is an id or its beginning.

    Exit codes: 0 done, 1 the job failed, 2 usage, 3 no daemon, 4 not found, 130 Ctrl-C.
    """


def run(arguments: list[str]) -> int:
    """One command line; its exit code."""
    try:
        code = remotectl.main(arguments, prog_name="remotectl", standalone_mode=False)
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return code if isinstance(code, int) else 0
