"""SURFACE rows F16 to F19: variables, code and state, arguments, content sent once."""

from __future__ import annotations

import hashlib

from tests.harness import Host
from tests.surface.test_f01_to_f06_calls import HEAD


def test_f16_env_of_decorator_and_config_none_is_the_callers_value(daemon: Host) -> None:
    script = daemon.write(
        "envs.py",
        HEAD
        + """
import os, warnings
config = CpuLiveServerless(name="env", env={"MODE": "config", "LEVEL": "config"})
@remote(config, env={"MODE": "decorator", "API_KEY": None, "ABSENT_ONE": None})
def look():
    import hashlib
    key = hashlib.sha256(os.environ["API_KEY"].encode()).hexdigest()
    return [os.environ.get("MODE"), os.environ.get("LEVEL"), key, os.environ.get("ABSENT_ONE")]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first = look().result().output
assert any("ABSENT_ONE" in str(w.message) for w in caught), caught
os.environ["API_KEY"] = os.environ["SECOND"]
print(json.dumps([first, look().result().output]))
""",
    )
    first, second = daemon.run(script, API_KEY="s3cret-value-1", SECOND="s3cret-value-2").json
    assert first == ["decorator", "config", hashlib.sha256(b"s3cret-value-1").hexdigest(), None]
    assert second[2] == hashlib.sha256(b"s3cret-value-2").hexdigest()
    daemon.stop()
    for path in daemon.state.rglob("*"):
        if path.is_file():
            assert b"s3cret-value" not in path.read_bytes(), f"a secret outlived its job in {path}"
    assert "s3cret" not in daemon.log()


def test_f17_globals_imports_helpers_classes_closures_lambdas_recursion_and_other_remote_functions(shared_daemon: Host) -> None:
    shared_daemon.write("helpers.py", "FACTOR = 3\ndef scale(x):\n    return x * FACTOR\n")
    result = shared_daemon.run(
        HEAD
        + """
import math, helpers
from dataclasses import dataclass
LIMIT = 10
@dataclass
class Point:
    x: int
    def norm(self): return math.sqrt(self.x ** 2) + LIMIT
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
double = lambda x: 2 * x
def make(offset):
    @remote(queue)
    def shifted(x): return x + offset
    return shifted
@remote(queue)
def everything(p): return [fib(10), double(4), helpers.scale(5), p.norm(), [double(x) for x in range(3)], json.dumps({"a": 1})]
@remote(queue)
def nested(x): return other(x).result().unwrap() + 1
@remote(queue)
def other(x): return x * 100
@remote(queue)
def give(): return Point(7)
returned = give().result().output
print(json.dumps([everything(Point(3)).result().unwrap(), make(5)(1).result().output, nested(2).result().unwrap(), isinstance(returned, Point)]))
"""
    )
    assert result.json == [[55, 8, 15, 13.0, [0, 2, 4], '{"a": 1}'], 6, 201, True]


def test_f17_globals_stay_between_calls_until_the_caller_changes_them(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
one = CpuLiveServerless(name="one", workersMax=1)
MODEL, G, LIST = None, 1, [1]
class Count: total = 0
@remote(one)
def load():
    global MODEL
    fresh = MODEL is None
    MODEL = MODEL or object()
    Count.total += 1
    return [fresh, Count.total]
@remote(one)
def see():
    LIST.append(len(LIST) + 1)
    return [G, MODEL is not None, list(LIST)]
found = [load().result().output, load().result().output, see().result().output]
G = 2; found.append(see().result().output)
G = 1; LIST = [7]; found.append(see().result().output)
print(json.dumps(found))
"""
    )
    assert result.json == [[True, 1], [False, 2], [1, True, [1, 2]], [2, True, [1, 2, 3]], [1, True, [7, 2]]]


def test_f17_an_edited_module_and_an_edited_script_run_the_new_code_in_a_warm_pool(shared_daemon: Host) -> None:
    script = """
from library import answer
one = CpuLiveServerless(name="edited", workersMax=1)
@remote(one)
def ask(): return [answer(), VERSION]
out = ask().result()
print(json.dumps([out.unwrap(), out.worker_id]))
"""
    shared_daemon.write("library.py", "STATE = []\ndef answer():\n    STATE.append(1)\n    return ['old', len(STATE)]\n")
    first = shared_daemon.run(HEAD + "VERSION = 1" + script).json
    again = shared_daemon.run(HEAD + "VERSION = 2" + script).json
    shared_daemon.write("library.py", "STATE = []\ndef answer():\n    STATE.append(1)\n    return ['new', len(STATE)]\n")
    edited = shared_daemon.run(HEAD + "VERSION = 2" + script).json
    assert first[0] == [["old", 1], 1]
    assert again == [[["old", 2], 2], first[1]], "same worker, module state kept, script's code new"
    assert edited[0] == [["new", 1], 2]


def test_f17_pickle_multiprocessing_and_joblib_work_on_names_of_the_script(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import multiprocessing, pickle
class Thing:
    def __init__(self, x): self.x = x
def square(x): return x * x
def take(thing): return thing.x
@remote(queue, max_retries=0, timeout=60)
def pickled(): return pickle.loads(pickle.dumps(Thing(5))).x
@remote(queue, max_retries=0, timeout=60)
def pooled(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        return [pool.map(square, range(4)), pool.map(take, [Thing(1), Thing(2)])]
@remote(queue, max_retries=0, timeout=60)
def jobbed():
    import joblib
    return joblib.Parallel(n_jobs=2)(joblib.delayed(take)(Thing(x)) for x in range(3))
if __name__ == "__main__":
    print(json.dumps([pickled().result().unwrap(), pooled("fork").result().unwrap(), pooled("spawn").result().unwrap(), jobbed().result().unwrap()]))
""",
        timeout=120,
    )
    assert result.json == [5, [[0, 1, 4, 9], [1, 2]], [[0, 1, 4, 9], [1, 2]], [0, 1, 2]]


def test_f18_arguments_of_every_kind_arrive_and_what_cannot_be_sent_is_named(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import numpy, threading
from pydantic import BaseModel
class Request(BaseModel):
    url: str
    threshold: float = 0.5
class Odd:
    def __reduce__(self): return (Odd.make, (3,))
    @staticmethod
    def make(n):
        made = Odd(); made.n = n
        return made
@remote(queue)
def echo(value): return value
array = numpy.arange(12.0).reshape(3, 4)
assert (echo(array).result().output == array).all()
assert (echo(array.T[::2]).result().output == array.T[::2]).all()
assert echo(Request(url="u")).result().output == Request(url="u")
assert echo(Odd()).result().output.n == 3
for value in (None, b"", "", [], {}, 0):
    assert echo(value).result().output == value
for size in (1, 65535, 65536, 65537, 30_000_000):
    assert echo(b"x" * size).result().output == b"x" * size, size
class Config: pass
config = Config(); config.callbacks = [1, {"lock": threading.Lock()}]
try: echo(config)
except SerializationError as error: print(error.path, isinstance(error, TypeError))
"""
    )
    assert result.out.strip().endswith("True")
    assert "value" in result.out
    assert ".callbacks[1]['lock']" in result.out


def test_f19_identical_large_arguments_are_not_sent_twice_but_the_function_runs_again(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
from remoted_client import connection, wire
sent = 0
real = wire.send
def counting(sock, data, fds=(), flags=0):
    global sent
    import os
    sent += len(data) + sum(os.fstat(fd).st_size for fd in fds)
    return real(sock, data, fds, flags)
connection.wire.send = counting
runs = 0
one = CpuLiveServerless(name="once", workersMax=1)
@remote(one)
def size(data):
    global runs
    runs += 1
    return [len(data), runs]
data = bytes(5_000_000)
first = size(data).result().output
after_first = sent
second = size(data).result().output
print(json.dumps([first, second, after_first > 5_000_000, sent - after_first < 10_000]))
"""
    )
    assert result.json == [[5_000_000, 1], [5_000_000, 2], True, True]
