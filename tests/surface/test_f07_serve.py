"""SURFACE row F07: ``remotectl serve SCRIPT``, on loopback with a token, and its documents."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remoted.api.answering import _TYPES
from remoted.cli.ending import CliError
from remoted.cli.gateway import listen
from tests.harness import Host, host, wait_until
from tests.surface.test_f07_http_routes import HEAD, Reply, ask, served

MAIN = "from remoted.cli import main; main()"
APP = """
@remote(lb)
async def square(x: int) -> int:
    "Gives x times x."
    print("squaring", x)
    return x * x
@remote(lb, method="GET", path="/items/{id}")
async def item(id: str) -> str: return id
@remote(lb)
async def words():
    yield "one "
    yield "two"
@remote(lb)
async def breaks():
    yield "one"
    raise ValueError("broke")
@remote(lb)
async def held():
    open("holding", "w").close()
    try: await asyncio.sleep(60)
    finally: open("stopped", "w").close()
@remote(CpuLiveServerless(name="queue"))
def queued(): return 1
if __name__ == "__main__": raise SystemExit("it was run as a program")
"""


def start(daemon: Host, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, "serve", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=daemon.environ, cwd=daemon.project, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


class Site:
    """What ``remotectl serve --json`` says where it is, and how it is asked."""

    def __init__(self, process: subprocess.Popen[str], host: Host) -> None:
        assert process.stdout is not None
        self.process, self.host = process, host
        self.is_told = False
        line = process.stdout.readline()
        assert line, process.communicate()[1] + host.log()
        self.told = json.loads(line)
        self.address = self.told["url"].removeprefix("http://")
        self.token = {"Authorization": f"Bearer {self.told['token']}"}

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        line = http.client.HTTPConnection(self.address, timeout=60)
        try:
            line.request(method, path, None if body is None else json.dumps(body), self.token if headers is None else headers)
            answer = line.getresponse()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            line.close()

    def news(self) -> Any:
        """The next line; None behind that of a request."""
        assert self.process.stdout is not None
        if self.is_told:
            return None
        document = json.loads(self.process.stdout.readline())
        self.is_told = document["op"] == "served"
        return document


@contextlib.contextmanager
def site_of(daemon: Host, script: str = APP, name: str = "app.py") -> Iterator[Site]:
    daemon.write(name, HEAD + script)
    process = start(daemon, name, "--json")
    try:
        yield Site(process, daemon)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with host() as made:
        made.start()
        with site_of(made) as found:
            yield found


def test_f07_serve_says_where_and_answers_whoever_has_the_token(site: Site) -> None:
    assert [(route["method"], route["path"]) for route in site.told["routes"]] == [
        ("POST", "/square"), ("GET", "/items/{id}"), ("POST", "/words"), ("POST", "/breaks"), ("POST", "/held"),
    ]  # fmt: skip
    assert site.ask("POST", "/square", {"x": 5}).json == 25
    news = list(iter(site.news, None))
    assert "".join(each["text"] for each in news if each["op"] == "output") == "squaring 5\n"
    assert (news[-1]["method"], news[-1]["path"], news[-1]["status"]) == ("POST", "/square", 200)
    assert site.ask("GET", "/items/a%2Fb%20c").json == "a/b c"
    assert site.ask("POST", "/square", {"x": "5"}).detail == [(["body", "x"], "int_type")]
    assert site.ask("POST", "/square?x=1", {"x": 1}).detail == [(["query", "x"], "extra_forbidden")]
    assert site.ask("GET", "/square").headers["allow"] == "POST"
    assert site.ask("POST", "/queued", {}).status == 404, "a queue class has no routes"
    assert ask(site.host, "POST", "/f/square", {"x": 6}).json == 36, "on the API socket too"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer "}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}, {"Cookie": "token=TOKEN"}])
def test_t62_without_the_token_nothing_is_told_and_nothing_runs(site: Site, headers: dict[str, str]) -> None:
    given = {name: value.replace("TOKEN", site.told["token"]) for name, value in headers.items()}
    for method, path in (("POST", "/square"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("POST", "/square?token=" + site.told["token"])):
        reply = site.ask(method, path, headers=given)
        assert (reply.status, reply.json["error"]["code"]) == (401, "NO_TOKEN")
        assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("name", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", ""])
def test_t62_another_host_name_is_refused_with_the_token_and_on_every_path(site: Site, name: str) -> None:
    port = site.address.rpartition(":")[2]
    for path in ("/docs", "/openapi.json", "/items/x"):
        reply = site.ask("GET", path, headers={**site.token, "Host": name.format(port=port)})
        assert (reply.status, reply.json["error"]["code"]) == (403, "WRONG_HOST")


def test_t62_localhost_is_a_name_of_it(site: Site) -> None:
    assert site.ask("GET", "/items/x", headers={**site.token, "Host": f"LOCALHOST:{site.address.rpartition(':')[2]}"}).json == "x"


def test_t62_two_host_headers_and_two_tokens_are_refused(site: Site) -> None:
    name, port = site.address.split(":")
    for head, status in ((f"Host: {site.address}\r\nHost: evil.example", b"40"), (f"Host: {site.address}\r\nAuthorization: Bearer x\r\nAuthorization: Bearer {site.told['token']}", b"401")):
        with socket.create_connection((name, int(port)), 30) as line:
            line.sendall(f"GET /items/x HTTP/1.1\r\n{head}\r\nConnection: close\r\n\r\n".encode())
            assert status in line.recv(100).split(b"\r\n")[0]


def test_t62_only_loopback_addresses_are_listened_on() -> None:
    for name in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(CliError, match="cannot listen on"):
            listen(name, 0)
    with listen("localhost", 0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"
        with pytest.raises(CliError, match="--port 0 takes a free one"):
            listen("127.0.0.1", sock.getsockname()[1])


def test_t62_another_process_of_the_same_user_is_not_reached_with_this_token(site: Site) -> None:
    script = """
@remote(plain, method="GET", path="/items/hidden")
def hidden(): return "hidden"
"""
    with served(site.host, script, "other.py"):
        assert ask(site.host, "GET", "/f/items/hidden").json == "hidden"
        assert site.ask("GET", "/items/hidden").json == "hidden", "what the parameter {id} is here"
        assert site.ask("GET", "/items/hidden", headers={**site.token, "X-Remoted-Process": "1"}).status == 200
        assert "/items/hidden" not in site.ask("GET", "/openapi.json").json["paths"]


def test_t62_no_answer_is_a_page_and_docs_hold_nothing_of_the_user(site: Site) -> None:
    docs = site.ask("GET", "/docs", headers={})
    script = site.ask("GET", "/docs.js", headers={})

    assert (docs.status, docs.headers["content-type"], script.headers["content-type"]) == (200, "text/html; charset=utf-8", "text/javascript; charset=utf-8")
    assert "default-src 'none'" in docs.headers["content-security-policy"]
    for page in (docs.body, script.body):
        assert site.told["token"].encode() not in page
        assert b"square" not in page
        for foreign in (b"http://", b"https://", b"innerHTML"):
            assert foreign not in page
    assert not any("html" in kind or "script" in kind for kind in _TYPES)
    assert site.told["docs"] == f"{site.told['url']}/docs#{site.told['token']}"


def test_t12_t62_silence_has_its_deadline_and_connections_their_cap(site: Site) -> None:
    name, port = site.address.split(":")
    lines = [socket.create_connection((name, int(port)), 30) for _ in range(257)]
    began = time.monotonic()
    assert lines[-1].recv(100) == b"", "one too many is closed at once"
    for line in lines[:3]:
        assert line.recv(100) == b""
    assert time.monotonic() - began < 25
    for line in lines:
        line.close()
    wait_until(lambda: _answers(site), 30)


def _answers(site: Site) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return site.ask("GET", "/items/x").status == 200
    return False


def test_f07_serve_openapi_is_that_of_its_functions_at_the_top(site: Site) -> None:
    document = site.ask("GET", "/openapi.json").json

    assert document["servers"] == [{"url": "/"}]
    assert set(document["paths"]) == {"/square", "/items/{id}", "/words", "/breaks", "/held"}
    assert document["paths"]["/square"]["post"]["summary"] == "Gives x times x."


def test_f07_serve_streams_and_what_breaks_off_lacks_its_end(site: Site) -> None:
    assert site.ask("POST", "/words", {}).body == b"one two"
    with pytest.raises(http.client.IncompleteRead):
        site.ask("POST", "/breaks", {})


def test_f07_serve_tells_a_lost_client_what_it_serves(site: Site) -> None:
    reply = site.ask("GET", "/v1/endpoints")
    assert reply.status == 404
    assert "GET /items/{id}" in reply.json["error"]["message"]
    assert "/f" not in reply.json["error"]["message"]


def test_f07_serve_takes_a_call_back_when_its_client_leaves(site: Site) -> None:
    line = http.client.HTTPConnection(site.address)
    line.request("POST", "/held", "{}", site.token)
    wait_until((site.host.project / "holding").exists, 30)
    line.close()
    wait_until((site.host.project / "stopped").exists, 30)


def test_f07_serve_ten_clients_at_once(site: Site) -> None:
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        assert [reply.json for reply in pool.map(lambda x: site.ask("POST", "/square", {"x": x}), range(50))] == [x * x for x in range(50)]


def test_f07_serve_too_large_is_refused_with_the_limit(site: Site) -> None:
    name, port = site.address.split(":")
    with socket.create_connection((name, int(port)), 30) as line:
        line.sendall(f"POST /square HTTP/1.1\r\nHost: {site.address}\r\nAuthorization: Bearer {site.told['token']}\r\nContent-Length: 99999999999\r\n\r\n".encode())
        assert line.recv(100).startswith(b"HTTP/1.1 413")


def test_f07_serve_survives_a_daemon_that_is_restarted(daemon: Host) -> None:
    with site_of(daemon) as site:
        daemon.terminate()
        away = site.ask("POST", "/square", {"x": 1})
        assert (away.status, away.json["error"]["code"]) == (503, "DAEMON_AWAY")
        daemon.start()
        wait_until(lambda: site.ask("POST", "/square", {"x": 3}).body == b"9", 30)


FAKE = """
import os, socket, sys
os.setgroups([]); os.setgid(60001); os.setuid(60001)
server = socket.socket(socket.AF_UNIX); server.bind(sys.argv[1]); os.chmod(sys.argv[1], 0o777); server.listen()
print("listening", flush=True)
print(server.accept()[0].recv(100), flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="NEEDS ROOT: two users")
def test_t08_serve_sends_a_strangers_daemon_not_one_byte(daemon: Host) -> None:
    with site_of(daemon) as site:
        daemon.terminate()
        daemon.sockets.chmod(0o777)
        daemon.folder.chmod(0o755)
        daemon.folder.parent.chmod(0o755)
        with subprocess.Popen([sys.executable, "-S", "-c", FAKE, str(daemon.sockets / "api.sock")], stdout=subprocess.PIPE, cwd="/") as fake:
            assert fake.stdout is not None
            assert fake.stdout.readline() == b"listening\n"
            assert site.ask("POST", "/square", {"x": 1}).status == 503
            assert fake.stdout.readline() == b"b''\n"


def test_f07_serve_in_words_ends_with_ctrl_c_and_takes_its_routes_along(daemon: Host) -> None:
    daemon.write("my-app.py", HEAD + APP)
    process = start(daemon, "my-app.py", "--only", "square")
    assert process.stdout is not None
    assert process.stderr is not None
    lines = [process.stdout.readline() for _ in range(6)]
    assert "POST    http://127.0.0.1:" in lines[1]
    assert lines[3].startswith("token: ")
    assert "/docs#" in lines[4]
    assert "serving 1 routes of my-app.py; Ctrl-C ends it" in process.stderr.readline()
    assert ask(daemon, "POST", "/f/square", {"x": 3}).json == 9
    assert process.stdout.readline() == "squaring 3\n"
    assert process.stderr.readline().startswith("POST /square 200 ")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)

    assert (process.returncode, out, err) == (0, "", "")
    wait_until(lambda: ask(daemon, "POST", "/f/square", {"x": 3}).status == 404, 30)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("x = 1", "it has no load-balanced function"),
        ("1 / 0", "importing it raised ZeroDivisionError"),
        (HEAD + "@remote(lb, method='GET', path='/docs')\ndef docs(): ...", "GET /docs is where its description stands"),
        (HEAD + "class Thing: ...\n@remote(lb)\ndef f(thing: Thing): ...", "cannot serve f: the parameter 'thing' cannot come over HTTP"),
        (HEAD + "@remote(lb)\ndef f(data: bytes): ...\n@remote(lb)\ndef g(): ...", "no form for the type bytes; to leave it out, name the functions to serve: --only NAME"),
        (HEAD + "@remote(lb)\ndef f(thing: Nothing): ...", "cannot read the type hints of f: name 'Nothing' is not defined"),
    ],
)
def test_f07_serve_says_why_it_cannot(bare_host: Host, script: str, said: str) -> None:
    bare_host.write("app.py", script)
    process = start(bare_host, "app.py")
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (1, "")
    assert said in err
    assert "remoted/cli" not in err


def test_f07_serve_leaves_no_trace_of_its_token(site: Site) -> None:
    command = Path(f"/proc/{site.process.pid}/cmdline").read_text()

    assert site.told["token"] not in command
    assert site.told["token"] not in site.host.log()
