"""SURFACE row F07: load-balanced functions by HTTP, on the API socket."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from remoted_client import CpuLiveLoadBalancer, CpuLiveServerless, remote
from tests.harness import Host, host, wait_until

HEAD = """
from __future__ import annotations
import asyncio, dataclasses, datetime, enum, json, os, sys, threading, time
from typing import *
from remoted_client import *
lb = CpuLiveLoadBalancer(name="http", max_concurrency=10, workersMax=1)
plain = CpuLiveLoadBalancer(name="plain", workersMax=1)
"""
TAIL = """
if __name__ == "__main__":
    with serve() as served:
        print(json.dumps(served.routes), flush=True)
        served.wait()
"""


class Reply:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def detail(self) -> list[tuple[list[Any], str]]:
        """Where a request did not fit, and what kind of problem it was."""
        assert self.status == 422, self.body
        return [(item["loc"], item["type"]) for item in self.json["detail"]]


class Line(http.client.HTTPConnection):
    """HTTP over the API socket."""

    def __init__(self, daemon: Host) -> None:
        super().__init__("remoted", timeout=60)
        self._path = str(daemon.sockets / "api.sock")

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self._path)

    def send(self, data: Any) -> None:
        """Refused before all of it was read: the answer is there all the same."""
        with contextlib.suppress(BrokenPipeError):
            super().send(data)


def ask(daemon: Host, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    line = Line(daemon)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    try:
        line.request(method, path, data, headers)
        answer = line.getresponse()
        return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        line.close()


def post(daemon: Host, name: str, /, **parameters: Any) -> Reply:
    return ask(daemon, "POST", f"/f/{name}", parameters)


@contextlib.contextmanager
def served(daemon: Host, script: str, name: str = "app.py") -> Iterator[subprocess.Popen[str]]:
    """A script whose routes are there."""
    process = daemon.popen(daemon.write(name, HEAD + script + TAIL))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("["), f"{line}\n{process.communicate(timeout=20)}\n{daemon.log()}"
        yield process
    finally:
        process.kill()
        process.communicate()


APP = """
class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"
@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.5
@dataclasses.dataclass
class Path:
    points: list[Point]
    closed: bool = False

@remote(resource_config=lb)
def square(x: int) -> int:
    "Gives x times x."
    return x * x
@remote(lb, method="GET", path="/items/{id}")
async def item(id: int, q: Optional[str] = None, tags: List[str] = [], big: bool = False): return [id, q, tags, big]
@remote(lb, method="GET", path="/items/newest")
async def newest(): return "newest"
@remote(lb, method="PUT", path="/items/{id}")
async def put(id: str, value: dict[str, int]): return {"id": id, "value": value}
@remote(lb, method="DELETE", path="/items/{id}")
async def delete(id: str): return None
@remote(lb, method="PATCH", path="/patch")
async def patch(**more): return more
@remote(lb)
async def kinds(a: int, b: float, c: str, d: bool, e: None, f: Colour, g: Literal["x", 3], h: int | str, i: Optional[Point],
                j: tuple[int, str], k: set[int], l: datetime.datetime, m: dict[int, list[Point]], n):
    return [type(value).__name__ for value in (a, b, c, d, e, f, g, h, i, j, k, l, m, n)] + [i, sorted(k), l, m]
def decorated(function):
    import functools
    @functools.wraps(function)
    def wrapper(*args, **kwargs): return function(*args, **kwargs)
    return wrapper
@remote(lb)
@decorated
async def stacked(a: int, b: Optional[Tree] = None): return [a, b]
class Leaf(TypedDict):
    leaf: int
class Tree(Leaf, total=False):
    below: list[Tree]
@remote(lb)
async def length(path: Path) -> int: return len(path.points)
@remote(lb)
async def many(pos: int, /, by: int = 2, *, last: str = "!"): return [pos, by, last]
@remote(lb)
async def give(what: str):
    import numpy
    values = {"array": numpy.arange(3), "scalar": numpy.float32(0.5), "nested": {"a": [numpy.int64(7), Colour.RED, Point(1)]}, "set": {"a": {1}},
              "nan": {"a": [1.0, float("nan")]}, "object": {"a": [0, {"b": object()}]}, "key": {(1, 2): 3}, "bytes": b"\\x00raw", "none": None}
    return values[what]
class Refused(Exception):
    status_code, detail = 404, "no such thing"
@remote(lb)
async def fail(how: str):
    if how == "own": raise Refused()
    if how == "exit": sys.exit(3)
    if how == "die": os._exit(7)
    if how == "value": raise ValueError("a secret-free reason")
@remote(lb, timeout=0.3)
async def slow(): await asyncio.sleep(60)
"""


@pytest.fixture(scope="module")
def app() -> Iterator[Host]:
    with host() as made:
        made.start()
        with served(made, APP):
            yield made


def test_f07_without_method_and_path_a_function_is_posted_to_by_its_name(app: Host) -> None:
    reply = post(app, "square", x=7)

    assert (reply.status, reply.json, reply.headers["content-type"]) == (200, 49, "application/json")


@pytest.mark.skipif(shutil.which("curl") is None, reason="NEEDS CURL")
def test_f07_curl_with_unix_socket(app: Host) -> None:
    command = ["curl", "-sS", "--unix-socket", str(app.sockets / "api.sock"), "-d", '{"x": 12}', "http://remoted/f/square"]

    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout == "144"


def test_f07_path_and_query_parameters_are_read_by_their_hints(app: Host) -> None:
    assert ask(app, "GET", "/f/items/3").json == [3, None, [], False]
    assert ask(app, "GET", "/f/items/3?q=a%20%26b&tags=x&tags=y&big=yes").json == [3, "a &b", ["x", "y"], True]
    assert ask(app, "GET", "/f/items/newest").json == "newest", "a text in a path goes before a parameter"
    assert ask(app, "PUT", "/f/items/a%2Fb", {"value": {"n": 1}}).json == {"id": "a/b", "value": {"n": 1}}
    assert ask(app, "DELETE", "/f/items/%C3%A9").json is None
    assert ask(app, "PATCH", "/f/patch", {"any": [1], "thing": "x"}).json == {"any": [1], "thing": "x"}


def test_f07_an_unknown_path_is_404_and_another_method_405_with_those_that_are_allowed(app: Host) -> None:
    assert ask(app, "POST", "/f/nothing", {}).status == 404
    assert ask(app, "GET", "/f/items/3/more").status == 404
    assert ask(app, "GET", "/f/items/%FF").status == 404
    wrong = ask(app, "POST", "/f/items/3", {})
    assert (wrong.status, wrong.headers["allow"]) == (405, "DELETE, GET, PUT")
    assert ask(app, "GET", "/f/square").headers["allow"] == "POST"


def test_f07_what_does_not_fit_is_422_with_every_field_named(app: Host) -> None:
    assert post(app, "square").detail == [(["body", "x"], "missing")]
    assert post(app, "square", x="7").detail == [(["body", "x"], "int_type")]
    assert post(app, "square", x=True).detail == [(["body", "x"], "int_type")]
    assert post(app, "square", x=7.0).json == 49
    assert post(app, "square", x=1, y=2).detail == [(["body", "y"], "extra_forbidden")]
    assert ask(app, "GET", "/f/items/x?z=1&q=1&q=2&big=maybe").detail == [
        (["query", "q"], "multiple_values"), (["path", "id"], "int_parsing"), (["query", "z"], "extra_forbidden"), (["query", "big"], "bool_parsing"),
    ]  # fmt: skip
    nested = post(app, "length", path={"points": [{"x": 1}, {"x": "1"}, {"y": 1}, 5], "open": True})
    assert nested.detail == [
        (["body", "path", "points", 1, "x"], "int_type"), (["body", "path", "points", 2, "x"], "missing"),
        (["body", "path", "points", 3], "dict_type"), (["body", "path", "open"], "extra_forbidden"),
    ]  # fmt: skip
    assert post(app, "length", path={"points": [{"x": 1}, {"x": 2}]}).json == 2
    assert ask(app, "POST", "/f/square?x=1", {"x": 1}).detail == [(["query", "x"], "extra_forbidden")]
    assert ask(app, "PUT", "/f/items/a", {"value": {}, "id": "b"}).detail == [(["body", "id"], "extra_forbidden")]


@pytest.mark.parametrize("body", [b"{", b"[1]", b"3", b'{"x": 1, "x": 2}', b'{"x": NaN}', b'{"x": 1e999}', b'{"x": "\\ud800"}', b"\xff", b'{"x": ' + b"[" * 20 + b"]" * 20 + b"}"])
def test_f07_a_body_that_is_no_object_of_strict_json_is_422(app: Host, body: bytes) -> None:
    reply = ask(app, "POST", "/f/square", body)

    assert [place for place, _ in reply.detail] == [["body"]]


def test_f07_type_hints_make_the_values(app: Host) -> None:
    good = {
        "a": 1, "b": 2, "c": "s", "d": False, "e": None, "f": "blue", "g": 3, "h": "3", "i": {"x": 4}, "j": [1, "one"], "k": [3, 3, 1],
        "l": "2024-02-29T12:00:00Z", "m": {"5": [{"x": 6, "y": 7}]}, "n": {"any": []},
    }  # fmt: skip
    names = ["int", "float", "str", "bool", "NoneType", "Colour", "int", "str", "Point", "tuple", "set", "datetime", "dict", "dict"]
    made = [{"x": 4, "y": 0.5}, [1, 3], "2024-02-29T12:00:00+00:00", {"5": [{"x": 6, "y": 7.0}]}]

    assert post(app, "kinds", **good).json == names + made
    bad = {"a": None, "b": "2", "c": 3, "d": 0, "e": 0, "f": "green", "g": "3", "h": 1.5, "i": 4, "j": [1], "k": 3, "l": "soon", "m": {"five": []}}
    assert post(app, "kinds", **bad).detail == [
        (["body", "a"], "int_type"), (["body", "b"], "float_type"), (["body", "c"], "string_type"), (["body", "d"], "bool_type"),
        (["body", "e"], "none_type"), (["body", "f"], "enum"), (["body", "g"], "literal_error"), (["body", "h"], "union_error"),
        (["body", "i"], "dict_type"), (["body", "j"], "tuple_length"), (["body", "k"], "set_type"), (["body", "l"], "datetime_parsing"),
        (["body", "m", "five", "[key]"], "int_parsing"), (["body", "n"], "missing"),
    ]  # fmt: skip


def test_f07_below_decorators_and_types_that_hold_themselves(app: Host) -> None:
    tree = {"leaf": 1, "below": [{"leaf": 2, "below": []}]}
    assert post(app, "stacked", a=1, b=tree).json == [1, tree]
    assert post(app, "stacked", a=1, b={"below": [{"leaf": "x"}]}).detail == [(["body", "b", "below", 0, "leaf"], "int_type"), (["body", "b", "leaf"], "missing")]
    schema = ask(app, "GET", "/v1/endpoints/openapi.json").json["components"]["schemas"]["post.stacked.Tree"]
    assert (schema["required"], schema["properties"]["below"]["items"]) == (["leaf"], {"$ref": "#/components/schemas/post.stacked.Tree"})


def test_f07_positional_only_parameters_and_defaults(app: Host) -> None:
    assert post(app, "many", pos=1).json == [1, 2, "!"]
    assert post(app, "many", by=5, pos=1, last="?").json == [1, 5, "?"]


def test_f07_results_become_json_and_what_cannot_is_named_by_its_path(app: Host) -> None:
    assert post(app, "give", what="array").json == [0, 1, 2]
    assert post(app, "give", what="scalar").json == 0.5
    assert post(app, "give", what="nested").json == {"a": [7, "red", {"x": 1, "y": 0.5}]}
    assert post(app, "give", what="set").json == {"a": [1]}
    assert post(app, "give", what="none").json is None
    raw = post(app, "give", what="bytes")
    assert (raw.body, raw.headers["content-type"]) == (b"\x00raw", "application/octet-stream")
    for what, place in (("nan", "the result['a'][1]"), ("object", "the result['a'][1]['b']"), ("key", "(1, 2)")):
        reply = post(app, "give", what=what)
        assert (reply.status, reply.json["exception"]) == (500, "remoted_client.http.encoding.NotJson")
        assert place in reply.json["error"]["message"]


def test_f07_an_exception_is_500_with_its_type_and_message_and_one_may_name_its_own_status(app: Host) -> None:
    failed = post(app, "fail", how="value")
    assert (failed.status, failed.json) == (500, {"error": {"code": "EXCEPTION", "message": "a secret-free reason"}, "exception": "ValueError"})
    own = post(app, "fail", how="own")
    assert (own.status, own.json) == (404, {"detail": "no such thing"})
    assert post(app, "fail", how="exit").json["exception"] == "SystemExit"
    died = post(app, "fail", how="die")
    assert (died.status, died.json["error"]["code"]) == (500, "WORKER_DIED")
    assert post(app, "square", x=2).json == 4, "another worker takes over"


def test_f07_a_call_that_takes_too_long_is_504(app: Host) -> None:
    reply = post(app, "slow")

    assert (reply.status, reply.json["error"]["code"]) == (504, "TIMED_OUT")


def test_f07_openapi_is_made_from_the_type_hints(app: Host) -> None:
    document = ask(app, "GET", "/v1/endpoints/openapi.json").json

    assert document["openapi"] == "3.1.0"
    assert document["servers"] == [{"url": "/f"}]
    square = document["paths"]["/square"]["post"]
    assert square["summary"] == "Gives x times x."
    body = square["requestBody"]["content"]["application/json"]["schema"]
    assert (body["properties"], body["required"], body["additionalProperties"]) == ({"x": {"type": "integer"}}, ["x"], False)
    assert square["responses"]["200"]["content"]["application/json"]["schema"] == {"type": "integer"}
    assert set(square["responses"]) == {"200", "422", "500", "503", "504"}
    places = [(parameter["name"], parameter["in"], parameter["required"]) for parameter in document["paths"]["/items/{id}"]["get"]["parameters"]]
    assert places == [("id", "path", True), ("q", "query", False), ("tags", "query", False), ("big", "query", False)]
    path = document["components"]["schemas"]["post.length.Path"]
    assert path["properties"]["points"]["items"] == {"$ref": "#/components/schemas/post.length.Point"}
    assert "post.length.Point" in document["components"]["schemas"]
    listed = ask(app, "GET", "/v1/endpoints").json["endpoints"]
    assert {(each["method"], each["path"]) for each in listed} == {(method.upper(), where) for where, found in document["paths"].items() for method in found}


def test_f07_pydantic_models_are_pydantics_to_check(daemon: Host) -> None:
    script = """
from pydantic import BaseModel, Field
class Item(BaseModel):
    name: str = Field(min_length=2)
    price: float = 1
@remote(plain)
def buy(item: Item, others: list[Item] = [], count: Annotated[int, Field(gt=0)] = 1) -> Item:
    return Item(name=item.name.upper(), price=item.price * count + len(others))
"""
    with served(daemon, script):
        assert post(daemon, "buy", item={"name": "tea", "price": 2}, others=[{"name": "xy"}], count=3).json == {"name": "TEA", "price": 7.0}
        wrong = post(daemon, "buy", item={"name": "t", "price": "much"}, others=[{}], count=0)
        assert wrong.detail == [
            (["body", "item", "name"], "string_too_short"), (["body", "item", "price"], "float_parsing"),
            (["body", "others", 0, "name"], "missing"), (["body", "count"], "greater_than"),
        ]  # fmt: skip
        document = ask(daemon, "GET", "/v1/endpoints/openapi.json").json
        schema = document["paths"]["/buy"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"]["item"]["properties"]["name"] == {"title": "Name", "type": "string", "minLength": 2}


STREAMS = """
@remote(lb)
def count(n: int):
    try:
        for i in range(n): yield {"i": i}
    finally:
        open("closed", "a").write("count\\n")
@remote(lb)
async def words(n: int):
    for i in range(n):
        print("word", i)
        yield f"w{i}\\n"
@remote(lb)
async def parts():
    yield b"\\x00" * 100_000
    yield b""
    yield b"\\x01" * 100_000
@remote(lb)
def breaks(at: int):
    for i in range(at): yield i
    raise RuntimeError("broke")
@remote(lb)
def mixed():
    yield "text"
    yield 3
@remote(lb)
async def endless():
    n = 0
    try:
        while True:
            yield "x" * 1000
            n += 1
            open("sent", "w").write(str(n))
    finally:
        open("left", "w").write(str(n))
"""


@pytest.fixture(scope="module")
def streams() -> Iterator[Host]:
    with host() as made:
        made.start()
        with served(made, STREAMS):
            yield made


def test_f07_generators_stream_a_line_of_json_for_each_item(streams: Host) -> None:
    reply = post(streams, "count", n=3)

    assert reply.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in reply.body.splitlines()] == [{"i": 0}, {"i": 1}, {"i": 2}]
    assert post(streams, "count", n=0).body == b""
    assert post(streams, "count", n=1000).body.count(b"\n") == 1000, "what was taken makes room for more"
    assert post(streams, "count", n=None).detail == [(["body", "n"], "int_type")]


def test_f07_strings_and_bytes_stream_as_they_are_and_as_events_if_the_client_accepts_those(streams: Host) -> None:
    text = post(streams, "words", n=2)
    assert (text.headers["content-type"], text.body) == ("text/plain; charset=utf-8", b"w0\nw1\n")
    events = ask(streams, "POST", "/f/words", {"n": 2}, Accept="text/event-stream")
    assert (events.headers["content-type"], events.body) == ("text/event-stream", b"data: w0\ndata: \n\ndata: w1\ndata: \n\n")
    assert ask(streams, "POST", "/f/count", {"n": 1}, Accept="text/event-stream").body == b'data: {"i":0}\n\n'
    assert post(streams, "parts").body == b"\x00" * 100_000 + b"\x01" * 100_000


def test_f07_a_stream_that_fails_before_its_first_item_is_500_and_later_lacks_its_end(streams: Host) -> None:
    assert post(streams, "breaks", at=0).status == 500
    for name, parameters in (("breaks", {"at": 2}), ("mixed", {})):
        with pytest.raises(http.client.IncompleteRead) as cut:
            post(streams, name, **parameters)
        assert cut.value.partial in (b'0\n1\n{"error": {"code": "EXCEPTION", "message": "broke"}, "exception": "RuntimeError"}\n', b"text")


def test_f07_a_stream_of_events_that_breaks_off_ends_with_an_error_event(streams: Host) -> None:
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(streams, "POST", "/f/breaks", {"at": 1}, Accept="text/event-stream")
    item, error, end = cut.value.partial.split(b"\n\n")
    assert (item, end) == (b"data: 0", b"")
    name, data = error.split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["error"]["code"] == "EXCEPTION"


def test_f07_a_path_that_is_not_there_is_told_what_is(streams: Host) -> None:
    reply = ask(streams, "GET", "/f/v1/endpoints")
    assert (reply.status, reply.json["error"]["code"]) == (404, "NO_ROUTE")
    assert "POST /breaks" in reply.json["error"]["message"]
    assert "each below /f" in reply.json["error"]["message"]


def test_f07_a_client_that_stops_reading_stops_the_generator_and_leaving_ends_it(streams: Host) -> None:
    line = Line(streams)
    line.request("POST", "/f/endless", b"{}")
    answer = line.getresponse()
    assert answer.read(4000) == b"x" * 4000

    seen = -1

    def stands_still() -> bool:
        nonlocal seen
        before, seen = seen, int((streams.project / "sent").read_text() or 0)
        return before == seen and seen > 0

    wait_until(stands_still, 30)
    answer.close()
    line.close()
    wait_until((streams.project / "left").exists, 30)
    assert int((streams.project / "left").read_text()) < 20_000, "it was held back by what its reader had not taken"
    assert post(streams, "words", n=1).status == 200, "the worker lives"


def test_f07_what_a_call_prints_is_shown_where_its_route_is_served(daemon: Host) -> None:
    script = """
@remote(plain)
def talk(): print("hello from the worker"); print("and an error", file=sys.stderr)
"""
    with served(daemon, script) as process:
        assert post(daemon, "talk").json is None
        assert process.stdout is not None
        assert process.stdout.readline() == "hello from the worker\n"
        process.kill()
        assert "and an error" in process.communicate()[1]


def test_f07_ten_clients_share_one_warm_worker_whose_body_is_async(daemon: Host) -> None:
    script = """
inside, most, gate = 0, 0, None
@remote(lb)
async def together(i: int):
    global inside, gate
    gate = gate or asyncio.Event()
    inside += 1
    if inside == 10: gate.set()
    await asyncio.wait_for(gate.wait(), 50)
    return [i, os.getpid()]
"""
    with served(daemon, script), concurrent.futures.ThreadPoolExecutor(10) as pool:
        found = [reply.json for reply in pool.map(lambda i: post(daemon, "together", i=i), range(10))]

    assert [i for i, _ in found] == list(range(10))
    assert len({pid for _, pid in found}) == 1


def test_f07_a_busy_pool_is_503_with_retry_after(bare_host: Host) -> None:
    bare_host.config.write_text("[limits]\npool_busy_seconds = 0.2\n")
    bare_host.start()
    script = """
@remote(plain)
def hold(): open("holding", "w"); time.sleep(60)
"""
    with served(bare_host, script):
        line = Line(bare_host)
        line.request("POST", "/f/hold", b"{}")
        wait_until((bare_host.project / "holding").exists, 30)
        reply = post(bare_host, "hold")
        line.close()

    assert (reply.status, reply.json["error"]["code"]) == (503, "POOL_BUSY")
    assert int(reply.headers["retry-after"]) >= 1


def test_f07_a_client_that_leaves_stops_the_call(daemon: Host) -> None:
    script = """
@remote(plain)
def hold():
    open("holding", "w").close()
    try: time.sleep(60)
    finally: open("stopped", "w").close()
@remote(plain)
def free(): return 1
"""
    with served(daemon, script):
        line = Line(daemon)
        line.request("POST", "/f/hold", b"{}")
        wait_until((daemon.project / "holding").exists, 30)
        line.close()
        wait_until((daemon.project / "stopped").exists, 30)
        assert post(daemon, "free").json == 1


def test_f07_globals_are_shared_with_plain_calls_and_stay_warm(daemon: Host) -> None:
    script = """
calls = 0
@remote(plain)
def more() -> int:
    global calls
    calls += 1
    return calls
if __name__ == "__main__": assert more().result() == 1
"""
    with served(daemon, script):
        assert [post(daemon, "more").json for _ in range(3)] == [2, 3, 4]


def test_f07_large_bodies_and_results_travel_and_the_limit_is_named(daemon: Host) -> None:
    script = """
@remote(plain)
def echo(text: str) -> str: return text * 4
"""
    with served(daemon, script):
        text = "é" * 200_000
        assert post(daemon, "echo", text="x" * 300_000).json == "x" * 1_200_000
        assert ask(daemon, "POST", "/f/echo", json.dumps({"text": text}, ensure_ascii=False).encode()).json == text * 4
        refused = ask(daemon, "POST", "/f/echo", b'{"text": "' + b"x" * (1 << 20) + b'"}')

    assert (refused.status, refused.json["error"]["code"]) == (413, "TOO_LARGE")


def test_f07_routes_end_with_their_process_and_one_that_is_taken_is_refused_by_name(daemon: Host) -> None:
    script = """
@remote(plain)
def here() -> str: return sys.argv[0]
"""
    with served(daemon, script) as first:
        second = daemon.run(daemon.write("second.py", HEAD + script + TAIL), check=False)
        assert f"cannot serve POST /here: your process {first.pid} serves POST /here" in second.err
        assert post(daemon, "here").status == 200
    wait_until(lambda: post(daemon, "here").status == 404, 30)


def test_f07_routes_come_back_when_the_daemon_does(daemon: Host) -> None:
    script = """
@remote(plain)
def here() -> int: return 1
"""
    with served(daemon, script):
        daemon.terminate()
        daemon.start()
        wait_until(lambda: post(daemon, "here").status == 200, 30)


def test_f07_a_daemon_that_serves_routes_is_not_idle(bare_host: Host) -> None:
    bare_host.config.write_text("[limits]\nuser_mode_idle_seconds = 0.5\nhousekeeping_seconds = 0.05\n")
    bare_host.start("--idle-exit")
    script = """
@remote(plain)
def here() -> int: return 1
"""
    with served(bare_host, script):
        assert bare_host.process is not None
        with pytest.raises(subprocess.TimeoutExpired):
            bare_host.process.wait(2)
        assert post(bare_host, "here").json == 1
    bare_host.process.wait(30)


def test_f07_what_cannot_be_a_route_is_refused_where_it_is_written() -> None:
    config = CpuLiveLoadBalancer(name="routes")
    for path in ("x", "/items/{id}/{id}", "/items/{id}x", "/{}", "/a b", "/a//b", "/a/", "/../x", "/a?b", "/ü\n"):
        with pytest.raises(ValueError, match="cannot use path="):
            remote(config, path=path)
    with pytest.raises(ValueError, match="has no parameter 'id'; did you mean 'idx'"):
        remote(config, path="/items/{id}")(_indexed)
    with pytest.raises(ValueError, match="method='get'"):
        remote(config, method="get")
    with pytest.raises(TypeError, match="are for functions"):
        remote(config, path="/x")(_Thing)


def _indexed(idx: int) -> int:
    return idx


class _Thing:
    pass


def test_f07_serve_refuses_what_it_cannot_serve_before_it_needs_a_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from remoted_client import serve

    monkeypatch.setenv("REMOTED_SOCKET", os.fspath(tmp_path / "none"))
    config = CpuLiveLoadBalancer(name="routes")
    with pytest.raises(TypeError, match="queue class"):
        serve(remote(CpuLiveServerless(name="queue"))(_indexed))
    with pytest.raises(TypeError, match="runs here"):
        serve(remote(config, local=True)(_indexed))
    with pytest.raises(TypeError, match="the parameter 'thing' cannot come over HTTP: JSON has no form for the type _Thing"):
        serve(remote(config)(_takes_a_thing))
    with pytest.raises(TypeError, match="the parameter 'value' cannot come from the query"):
        serve(remote(config, method="GET")(_takes_an_object))
    with pytest.raises(TypeError, match="no load-balanced function"):
        serve()


def _takes_a_thing(thing: _Thing) -> None: ...
def _takes_an_object(value: dict[str, int]) -> None: ...
