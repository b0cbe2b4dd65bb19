"""What is measured: each bench opens its contenders, and says which lines of the table it fills."""

from __future__ import annotations

import contextlib
import functools
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import bodies, peers
from benchmarks.measure import Contender, Scale, many, one, rate
from benchmarks.ours import BenchHost, Functions, cpu_seconds, unwrap
from benchmarks.pingpong import PingPong

MIB = 1 << 20


@dataclass(frozen=True)
class Budget:
    """A bound of DESIGN.md section 6: a value in the bench's base unit, or so many times the p50 of ``of`` (the floor)."""

    amount: float
    of: str = ""


@dataclass(frozen=True)
class Line:
    """One line of the table: one of our contenders, one statistic."""

    title: str
    ours: str
    stat: str = "p50"
    budget: Budget | None = None


@dataclass
class Setting:
    """What a bench may use while it is open. ``notes`` go to the JSON."""

    host: BenchHost
    functions: Functions
    scale: Scale
    peers: list[str]
    stack: contextlib.ExitStack
    notes: dict[str, Any] = field(default_factory=dict)

    def peer(self, name: str) -> Any:
        found = peers.start(name)
        self.stack.callback(found.close)
        return found


@dataclass(frozen=True)
class Bench:
    """``unit`` is the base unit of the samples: s, jobs/s, bytes or share (of one core)."""

    name: str
    title: str
    unit: str
    shown: str
    open: Callable[[Setting], list[Contender]]
    rounds: Callable[[Scale], int]
    lines: tuple[Line, ...]
    more_is_better: bool = False


# -- calls -------------------------------------------------------------------------------------------------


def _latency(setting: Setting) -> list[Contender]:
    actions: dict[str, Callable[[], Any]] = {}
    for kind in ("direct", "queue"):
        function = setting.functions.on(kind, bodies.noop)
        actions[kind] = functools.partial(_call, function)
    actions["method"] = functools.partial(_call, setting.functions.on("direct", bodies.Same)().noop)
    floor = PingPong()
    setting.stack.callback(floor.close)
    actions["anywhere"] = floor.call
    for name in setting.peers:
        peer = setting.peer(name)
        actions[name] = functools.partial(peer.call, bodies.noop)
        if name == "ray":
            actions["ray task"] = peer.task
    for action in actions.values():
        many(action, setting.scale.warmup_calls)()
    samplers = {name: many(action, setting.scale.latency_calls, setting.scale.turn_calls) for name, action in actions.items()}
    samplers["floor"] = functools.partial(floor.call_apart, samplers["anywhere"])
    return [Contender(name, sampler) for name, sampler in samplers.items()]


def _call(function: Any, *arguments: Any) -> Any:
    return unwrap(function(*arguments).result())


def _throughput(setting: Setting) -> list[Contender]:
    jobs = setting.scale.jobs
    found: list[Contender] = []
    for kind in ("direct", "queue"):
        function = setting.functions.on(kind, bodies.same)
        _call(function, 0)
        found.append(Contender(kind, rate(functools.partial(function.map, range(jobs)), jobs)))
    for name in setting.peers:
        peer = setting.peer(name)
        peer.call(bodies.same, 0)
        found.append(Contender(name, rate(functools.partial(peer.map, bodies.same, range(jobs)), jobs)))
    return found


def _cold(setting: Setting, body: Callable[[], Any], imports: str, call: Callable[..., Any] | None = None, **options: Any) -> list[Contender]:
    functions = setting.functions
    call = call or _call_cold
    call(functions, "direct", body, options)  # neither the client's connection nor what a fork server imports is measured
    found = [Contender(kind, one(functools.partial(call, functions, kind, body, options))) for kind in ("direct", "queue")]
    found.append(Contender("floor", one(functools.partial(_python, f"import {imports}"))))
    for name in setting.peers:
        peers.prepare(name)
        found.append(Contender(name, _first_call(name, body)))
    return found


def _call_cold(functions: Functions, kind: str, body: Callable[[], Any], options: dict[str, Any]) -> Any:
    return _call(functions.cold(kind, body, **options))


def _call_fresh(functions: Functions, kind: str, body: Callable[[], Any], options: dict[str, Any]) -> Any:
    """With a variable that interpreters read when they start: no fork server has it yet."""
    return _call(functions.cold(kind, body, env={"PYTHONBENCH": secrets.token_hex(8)}, **options))


def _first_call(name: str, body: Callable[[], Any]) -> Callable[[], list[float]]:
    """From nothing to the first result; the end of the worker is not counted."""

    def sample() -> list[float]:
        began = time.perf_counter()
        peer = peers.start(name)
        peer.call(body)
        seconds = time.perf_counter() - began
        peer.close()
        return [seconds]

    return sample


def _array(setting: Setting) -> list[Contender]:
    import numpy as np

    array = np.arange(setting.scale.array_mib * MIB // 8, dtype=np.float64)
    marks = iter(range(1, 1 << 30))

    def there_and_back(call: Callable[[Any], Any]) -> float:
        array[0] = mark = next(marks)  # never the same bytes twice: nothing may come from a cache
        began = time.perf_counter()
        got = call(array)
        seconds = time.perf_counter() - began
        if got.shape != array.shape or got[0] != mark or got[-1] != array[-1]:
            raise RuntimeError("another array came back")
        return seconds

    actions: dict[str, Callable[[Any], Any]] = {kind: functools.partial(_call, setting.functions.on(kind, bodies.same)) for kind in ("direct", "queue")}
    there, back = np.empty_like(array), np.empty_like(array)

    def copy_twice(sent: Any) -> Any:
        np.copyto(there, sent)
        np.copyto(back, there)
        return back

    actions["floor"] = copy_twice
    for name in setting.peers:
        actions[name] = functools.partial(setting.peer(name).call, bodies.same)
    for action in actions.values():
        there_and_back(action)
    return [Contender(name, functools.partial(_second, there_and_back, action)) for name, action in actions.items()]


# -- what it costs to have ---------------------------------------------------------------------------------


def _memory(setting: Setting) -> list[Contender]:
    process = setting.host.process_of_daemon
    time.sleep(min(1.0, setting.scale.idle_seconds))
    setting.notes["children"] = [{"name": child.name(), "program": _program(child), "rss": child.memory_info().rss} for child in process.children(True)]
    setting.notes["daemon_threads"] = process.num_threads()
    setting.notes["daemon_uss"] = process.memory_full_info().uss
    return [Contender("daemon", lambda: [float(process.memory_info().rss)])]


def _program(process: psutil.Process) -> str:
    """What the interpreter runs, without the folders of this run."""
    arguments = process.cmdline()[1:2]
    return Path(arguments[0]).name if arguments else ""


def _processor(setting: Setting) -> list[Contender]:
    process = setting.host.process_of_daemon

    def sample() -> list[float]:
        before, began = cpu_seconds(process), time.perf_counter()
        time.sleep(setting.scale.idle_seconds)
        return [(cpu_seconds(process) - before) / (time.perf_counter() - began)]

    return [Contender("daemon", sample)]


def _status(setting: Setting) -> list[Contender]:
    command = [str(Path(sys.executable).with_name("remotectl")), "status"]
    if not Path(command[0]).exists():
        command = [sys.executable, "-c", "import sys; sys.argv = ['remotectl', 'status']; from remoted.cli import main; main()"]
    run = functools.partial(subprocess.run, command, env=setting.host.environ, stdout=subprocess.DEVNULL, check=True)
    run()
    return [Contender("status", one(run)), Contender("floor", one(functools.partial(_python, "pass")))]


_IMPORTS = {
    "remoted_client": "import remoted_client",
    "names": "from remoted_client import remote, LiveServerless",
    "pool": "from concurrent.futures import ProcessPoolExecutor",
    "loky": "import loky",
    "ray": "import ray",
}


def _imports(setting: Setting) -> list[Contender]:
    wanted = ["remoted_client", "names", *setting.peers]
    for name in wanted:
        _import_seconds(setting.host, _IMPORTS[name])  # bytecode and page cache
    return [Contender(name, functools.partial(_listed, _import_seconds, setting.host, _IMPORTS[name])) for name in wanted]


def _import_seconds(host: BenchHost, statement: str) -> float:
    """What the statement takes in a new interpreter, without the interpreter."""
    code = f"import time; began = time.perf_counter()\n{statement}\nprint(time.perf_counter() - began)"
    return float(subprocess.run([sys.executable, "-c", code], env=host.environ, stdout=subprocess.PIPE, check=True).stdout)


def _listed(measure: Callable[..., float], *arguments: Any) -> list[float]:
    """One duration that ``measure`` takes itself, as a sample."""
    return [measure(*arguments)]


def _second(measure: Callable[..., float], *arguments: Any) -> list[float]:
    """The same, after one that is not counted: others have had their turn."""
    measure(*arguments)
    return _listed(measure, *arguments)


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=True)


def _idle(when: str) -> tuple[Bench, ...]:
    return (
        Bench(f"rss-{when}", f"daemon, idle, {when}: resident memory", "bytes", "MB", _memory, lambda scale: 1, (Line(f"daemon RSS, idle, {when}", "daemon", budget=Budget(60e6)),)),
        Bench(f"cpu-{when}", f"daemon, idle, {when}: share of a core", "share", "%", _processor, lambda scale: 1, (Line(f"daemon CPU, idle, {when}", "daemon", budget=Budget(0.002)),)),
    )


BENCHES: tuple[Bench, ...] = (
    *_idle("fresh"),
    Bench(
        "latency", "no-op, warm", "s", "us", _latency, lambda scale: scale.rounds,
        (
            Line("no-op, load-balanced, p50", "direct", "p50", Budget(1.6, "floor")),
            Line("no-op, load-balanced, p99", "direct", "p99", Budget(3.2, "floor")),
            Line("no-op method, load-balanced, p50", "method", "p50"),
            Line("no-op, durable queue, p50", "queue", "p50", Budget(1e-3)),
            Line("no-op, durable queue, p99", "queue", "p99"),
            Line("the floor where the kernel puts it, p50", "anywhere", "p50"),
        ),
    ),
    Bench(
        "throughput", "map of no-ops, one worker", "jobs/s", "jobs/s", _throughput, lambda scale: scale.map_rounds,
        (Line("map, durable queue", "queue", budget=Budget(10_000)), Line("map, load-balanced", "direct")),
        more_is_better=True,
    ),
    Bench(
        "cold", "first call, cold pool", "s", "ms", lambda setting: _cold(setting, bodies.noop, "cloudpickle"), lambda scale: scale.cold_rounds,
        (Line("first call, cold, load-balanced", "direct", budget=Budget(1.5, "floor")), Line("first call, cold, queue", "queue", budget=Budget(1.5, "floor"))),
    ),
    Bench(
        "fresh", "first call, cold pool, no fork server yet", "s", "ms", lambda setting: _cold(setting, bodies.noop, "cloudpickle", _call_fresh), lambda scale: min(3, scale.cold_rounds),
        (Line("first call, cold, no fork server yet", "direct"),),
    ),
    Bench(
        "preload", "first call, cold pool, preload=numpy", "s", "ms",
        lambda setting: _cold(setting, bodies.numpy_version, "cloudpickle, numpy", preload=["numpy"]), lambda scale: min(3, scale.cold_rounds),
        (Line("first call, cold, preload numpy", "direct", budget=Budget(0.030)),),
    ),
    Bench(
        "array", "float64 array, there and back", "s", "ms", _array, lambda scale: scale.array_rounds,
        (Line("array there and back, load-balanced", "direct", budget=Budget(0.025)), Line("array there and back, queue", "queue")),
    ),
    Bench("status", "remotectl status", "s", "ms", _status, lambda scale: scale.command_rounds, (Line("remotectl status, wall", "status", budget=Budget(0.100)),)),
    Bench(
        "import", "import in a new interpreter", "s", "ms", _imports, lambda scale: scale.command_rounds,
        (Line("import remoted_client", "remoted_client", budget=Budget(0.020)), Line("... import remote, LiveServerless", "names", budget=Budget(0.020))),
    ),
    *_idle("after"),
)
