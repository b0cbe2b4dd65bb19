"""serve: the functions of a script by HTTP, for as long as the command runs."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from remoted.cli.ending import CliError, NoDaemon, UsageError
from remoted.cli.text import cell, duration, escape, paint, print_json_line, table

if TYPE_CHECKING:
    from remoted.cli.gateway import Gateway
    from remoted_client.http.route import Route
    from remoted_client.serving import Served


@click.command()
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="A loopback address to listen on.")
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="The port; by default a free one.")
@click.option("--only", "names", multiple=True, metavar="NAME", help="Serve this function alone; may be given again.")
@click.option("--json", "as_json", is_flag=True, help="A document a line: first where it is served, then each request and what was printed.")
def serve(script: Path, host: str, port: int, names: tuple[str, ...], as_json: bool) -> int:
    """Give the load-balanced functions of SCRIPT their HTTP routes, until Ctrl-C.

    They are there for you on the daemon's api.sock below /f, and here on loopback for whoever has the token. SCRIPT is
    imported, not run as a program: `if __name__ == "__main__"` is not for it.
    """
    from remoted.cli.gateway import Gateway, listen

    with listen(host, port) as sock:
        routes = _routes(script, names)
        served = _register(routes, as_json)
        try:
            gateway = Gateway(sock, served.process)
            _tell(script, gateway, routes, as_json)
            asyncio.run(_serve(gateway, served))
        finally:
            served.close()
    if served.failure is not None:
        raise CliError(f"the routes are not served any more: {served.failure}")
    return 0


def _routes(script: Path, names: tuple[str, ...]) -> list[Route]:
    from remoted.cli.gateway import RESERVED
    from remoted_client.http.route import functions_in, routes_in

    module = _load(script)
    for name in names:
        if name not in vars(module):
            raise UsageError(f"cannot serve {name}: {script} has nothing of this name at its top level")
    try:
        routes = routes_in(functions_in(vars(module), names), "to leave it out, name the functions to serve: --only NAME")
    except TypeError as error:
        raise CliError(str(error)) from error
    if not routes:
        raise CliError(f"cannot serve {script}: it has no load-balanced function with @remote at its top level, e.g. @remote(CpuLiveLoadBalancer(name='api'))")
    for route in routes:
        if str(route) in RESERVED:
            raise CliError(f"cannot serve {route.name}: {route} is where its description stands; give it another path=")
    return routes


def _load(script: Path) -> ModuleType:
    """The script as a module: its functions travel like those of any module of a project."""
    path = script.resolve()
    name = "".join(c if c.isalnum() else "_" for c in path.stem)
    name = name if name not in sys.modules and name not in sys.stdlib_module_names else f"{name}_script"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"cannot serve {script}: it is no Python file; its name must end in .py")
    sys.path.insert(0, os.fspath(path.parent))
    sys.argv = [os.fspath(script)]
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.stderr.write(escape("".join(traceback.format_exception(type(error), error, _behind_importing(error)))))
        raise CliError(f"cannot serve {script}: importing it raised {type(error).__name__}") from error
    return module


def _behind_importing(error: BaseException) -> Any:
    """The traceback from the script's first frame on."""
    entry = error.__traceback__
    while entry is not None and ("importlib" in entry.tb_frame.f_code.co_filename or entry.tb_frame.f_code.co_filename == __file__):
        entry = entry.tb_next
    return entry


def _register(routes: list[Route], as_json: bool) -> Served:
    from remoted_client import DaemonUnreachable, RemotedError
    from remoted_client.serving import Served

    try:
        if as_json:
            return Served(routes, print_json_line, lambda stream, text: print_json_line({"op": "output", "stream": {1: "stdout"}.get(stream, "stderr"), "text": text}))
        return Served(routes, _log)
    except DaemonUnreachable as error:
        raise NoDaemon(str(error)) from error
    except RemotedError as error:
        raise CliError(str(error)) from error


async def _serve(gateway: Gateway, served: Served) -> None:
    """Until SIGINT or SIGTERM, or until the routes are gone."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    over = loop.create_task(asyncio.to_thread(served.wait))
    over.add_done_callback(lambda _: stop.set())
    await gateway.start()
    try:
        await stop.wait()
    finally:
        await gateway.close()
        served.close()
        await asyncio.gather(over, return_exceptions=True)


def _tell(script: Path, gateway: Gateway, routes: list[Route], as_json: bool) -> None:
    docs = f"{gateway.url}/docs#{gateway.token}"
    if as_json:
        found = [{"method": route.method, "path": route.path, "name": route.name, "stream": route.is_stream} for route in routes]
        print_json_line({"op": "serving", "url": gateway.url, "token": gateway.token, "docs": docs, "routes": found})
        return
    rows = [[route.method, f"{gateway.url}{cell(route.path, 100)}", cell(route.name)] for route in routes]
    print("\n".join(table(["METHOD", "URL", "FUNCTION"], rows)))
    print(f"\ntoken: {gateway.token}\ndocs:  {docs}\n", flush=True)
    print(f"remotectl: serving {len(routes)} routes of {cell(script, 60)}; Ctrl-C ends it", file=sys.stderr, flush=True)


def _log(news: dict[str, Any]) -> None:
    """One line for each request, and why it failed."""
    status = news["status"]
    colour = "green" if status < 400 else "yellow" if status < 500 else "red"
    text = f"{news['method']} {cell(news['path'], 100)} {paint(str(status), colour)} {_took(news['seconds'])}"
    trouble = news.get("traceback") or (f"{news['error']}\n" if news.get("error") else "")
    sys.stderr.write(f"{text}\n{escape(trouble)}")
    sys.stderr.flush()


def _took(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else f"{seconds * 1000:.1f} ms"
