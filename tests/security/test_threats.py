"""Threats that need no more than a daemon and a look at it: what is open, what is inherited, what can be read."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from remoted.access import OVERFLOW_UID, Access, Peer, Rule
from remoted.blobs import Blobs
from remoted.errors import BadRequest
from remoted.paths import Paths
from remoted.spool import Spool
from remoted_client import wire
from tests.faults.rawclient import RawClient, raw
from tests.harness import ROOT, Host, wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NEEDS ROOT: two users")

HEAD = """
import json, os, signal, sys, time
from remoted_client import *
from remoted_client import remote, CpuLiveServerless
queue = CpuLiveServerless(name="queue", workersMax=1)
"""


def daemon_of(host: Host) -> psutil.Process:
    assert host.process is not None
    return psutil.Process(host.process.pid)


def links(pid: int) -> dict[str, str]:
    """What each descriptor of a process is."""
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[path.name] = os.readlink(path)
        except OSError:  # closed meanwhile
            continue
    return found


# -- who may ask -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uid", "daemon_uid", "admitted"),
    [
        (1000, 1000, True),
        (0, 1000, True),
        (1001, 1000, False),
        (1000, 0, False),
        (OVERFLOW_UID, 1000, False),
        (0, OVERFLOW_UID, False),
        (2**31, 2**31, True),
        (2**31, 1000, False),
        (2**32 - 2, 1000, False),
    ],
)
def test_t03_the_daemons_own_user_and_root_are_admitted_and_nobody_else(uid: int, daemon_uid: int, admitted: bool) -> None:
    peer = Peer(uid, uid, 1)

    access = Access(daemon_uid)
    assert access.admits(peer) is admitted
    assert access.allows(Rule.OWN, peer) is admitted
    assert not access.allows(Rule.ADMIN, peer) or uid in (0, daemon_uid)


@pytest.mark.parametrize(("uid", "admitted"), [(0, True), (1000, True), (2**31, True), (2**32 - 2, True), (OVERFLOW_UID, False)])
def test_t03_the_systems_daemon_admits_everybody_but_nobody(uid: int, admitted: bool) -> None:
    access = Access(0, serves_everybody=True, runs_root=False)
    peer = Peer(uid, uid, 1)

    assert access.admits(peer) is admitted
    assert access.allows(Rule.ADMIN, peer) is (uid == 0)
    assert access.may_run(peer) is (uid != 0)


_STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(60001); os.setuid(60001)
if sys.argv[1].isdigit():
    sock = socket.socket(fileno=int(sys.argv[1]))
else:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
sock.settimeout(20)
try:
    sock.sendall(bytes.fromhex(sys.argv[2]))
    print(sock.recv(65536))
except OSError as error:
    print(repr(error))
"""
_HELLO = wire.encode({"op": "hello", "protocol": wire.PROTOCOL, "started": 0})


def _as_stranger(where: str, pass_fds: tuple[int, ...] = ()) -> str:
    """What another user hears who greets the daemon at a path, or over a descriptor that was given to him."""
    command = [sys.executable, "-S", "-c", _STRANGER, where, _HELLO.hex()]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", pass_fds=pass_fds, timeout=30, check=True).stdout


@needs_root
def test_t01_another_user_who_reaches_the_data_socket_gets_no_welcome(daemon: Host) -> None:
    for folder in (daemon.folder.parent, daemon.folder, daemon.sockets):
        folder.chmod(0o755)
    (daemon.sockets / "data.sock").chmod(0o666)
    assert "welcome" not in _as_stranger(os.fspath(daemon.sockets / "data.sock"))
    with raw(daemon) as client:
        client.ping()


@needs_root
def test_t06_a_connection_is_its_connectors_whoever_holds_it(shared_daemon: Host) -> None:
    """Documented, not prevented: who hands a connection on hands on what he may do."""
    client = RawClient(shared_daemon, greet=False)
    try:
        assert "welcome" in _as_stranger(str(client.sock.fileno()), (client.sock.fileno(),))
    finally:
        client.close()


_FAKE = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
os.setgid(60001); os.setuid(60001)
sock.bind(sys.argv[1]); os.chmod(sys.argv[1], 0o777); sock.listen()
print("listening", flush=True)
connection, _ = sock.accept()
print(connection.recv(1000), flush=True)
"""


@needs_root
def test_t08_the_client_says_nothing_to_a_strangers_daemon(bare_host: Host) -> None:
    folder = Path(tempfile.mkdtemp(prefix="rt-"))
    folder.chmod(0o777)
    fake = subprocess.Popen([sys.executable, "-S", "-c", _FAKE, os.fspath(folder / "data.sock")], stdout=subprocess.PIPE, cwd="/")
    try:
        assert fake.stdout is not None
        assert fake.stdout.readline() == b"listening\n"
        program = "@remote(queue)\ndef f(): return 1\ntry: f().result()\nexcept DaemonUnreachable as error: print(json.dumps(str(error)))"
        told = bare_host.run(HEAD + program, REMOTED_SOCKET=os.fspath(folder)).json
        assert "uid 60001" in told
        assert fake.communicate(timeout=20)[0] == b"b''\n"
    finally:
        fake.kill()
        fake.wait()
        shutil.rmtree(folder)


def test_t11_sockets_are_private_and_none_is_abstract(shared_daemon: Host) -> None:
    assert stat.S_IMODE(shared_daemon.sockets.stat().st_mode) == 0o700
    for name in ("data.sock", "api.sock"):
        found = (shared_daemon.sockets / name).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, os.geteuid())
    listening = {connection.laddr for connection in daemon_of(shared_daemon).net_connections("all") if connection.laddr}
    assert listening == {os.fspath(shared_daemon.sockets / name) for name in ("data.sock", "api.sock")}, "an abstract name begins with NUL or @"


# -- what a worker inherits --------------------------------------------------------------------------------


def test_t25_a_worker_has_its_callers_umask_and_directory_and_a_session_of_its_own(bare_host: Host) -> None:
    """The daemon itself is started with other masks, as a careless parent would."""
    old, blocked = os.umask(0), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGHUP})
    try:
        bare_host.start()
    finally:
        os.umask(old)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    found = bare_host.run(
        HEAD
        + """
@remote(queue)
def look():
    with open("made", "w"): pass
    ignored = int(next(line for line in open("/proc/self/status") if line.startswith("SigIgn")).split()[1], 16)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    return [oct(os.stat("made").st_mode & 0o777), os.getcwd(), os.getsid(0) == os.getpid(), bool(ignored & 1 << signal.SIGTERM - 1)]
os.umask(0o027)
print(json.dumps(look().result().unwrap()))
"""
    ).json

    assert found == ["0o640", os.fspath(bare_host.project), True, False]


def test_t26_a_worker_has_no_descriptor_of_the_daemons(shared_daemon: Host) -> None:
    """The daemon is busy meanwhile: an idle connection, its database and its locks are open."""
    with raw(shared_daemon):
        found = shared_daemon.run(
            HEAD
            + """
@remote(queue)
def look():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try: found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError: pass
    return found
print(json.dumps(look().result().unwrap()))
"""
        ).json
        theirs = set(links(daemon_of(shared_daemon).pid).values())

    sockets = {link for link in found if link.startswith("socket:")}
    files = {link for link in found if link.startswith("/") and not link.startswith(("/dev/", "/proc/", "/memfd:"))}
    assert sockets.isdisjoint(theirs), "a socketpair has two inodes: none of the daemon's ends is here"
    assert not {link for link in files if str(shared_daemon.state) in link and not link.endswith((".pyz", ".outcomes", ".output", ".begun"))}, "its own spool is all that it may write to"
    assert len(sockets) <= 3


def test_t27_nothing_of_the_daemons_environment_reaches_a_body(bare_host: Host) -> None:
    bare_host.start(DAEMONS_OWN="secret", NOTIFY_SOCKET="/nowhere", LISTEN_FDS="3", LISTEN_PID="1", PYTHONSTARTUP="/nowhere", MALLOC_ARENA_MAX="1")
    found = bare_host.run(
        HEAD
        + """
@remote(queue)
def look(): return dict(os.environ), open("/proc/self/environ").read()
now, born = look().result().unwrap()
names = ["DAEMONS_OWN", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "PYTHONSTARTUP", "MALLOC_ARENA_MAX"]
print(json.dumps([name for name in names if name in now or name in born]))
"""
    ).json

    assert found == []


# -- what the daemon runs and reads ------------------------------------------------------------------------


def test_t31_a_daemon_started_from_a_folder_of_traps_imports_none(bare_host: Host) -> None:
    """The client starts it from the script's folder, where modules of its own names lie."""
    marks = bare_host.folder / "trapped"
    for name in ("sqlite3", "aiohttp", "psutil", "pydantic"):
        bare_host.write(f"{name}.py", f"open({os.fspath(marks)!r}, 'a').write('{name}')\nraise SystemExit('trap')\n")
    program = "@remote(queue)\ndef f(): return os.getpid()\nprint(json.dumps(f().result().unwrap()))"
    try:
        assert bare_host.run(HEAD + program).json
        assert not marks.exists(), marks.read_text()
    finally:
        _stop_own_daemon(bare_host)


def _stop_own_daemon(host: Host) -> None:
    lock = host.state / "remoted" / "lock"
    if lock.exists() and (text := lock.read_text().strip()):
        process = psutil.Process(int(text))
        process.terminate()
        process.wait(15)


@pytest.mark.parametrize("direct", [False, True], ids=["queue", "direct"])
def test_t32_a_pickle_never_runs_in_the_daemon(shared_daemon: Host, direct: bool) -> None:
    """Code, arguments, results, items and exceptions note who builds them again."""
    marks = shared_daemon.project / f"built-{direct}"
    kind = "CpuLiveLoadBalancer" if direct else "CpuLiveServerless"
    shared_daemon.run(
        HEAD
        + f"""
from remoted_client import {kind}
pool = {kind}(name="t32-{direct}")
def build(path):
    open(path, "a").write(f"{{os.getpid()}}\\n")
    return Bomb(path)
class Bomb(Exception):
    def __init__(self, path): self.path = path
    def __reduce__(self): return build, (self.path,)
@remote(pool)
def there_and_back(bomb): return bomb
@remote(pool)
def many(bomb): yield bomb
@remote(pool)
def fails(bomb): raise bomb
bomb = Bomb({os.fspath(marks)!r})
there_and_back(bomb).result()
list(many(bomb))
try: fails(bomb).result()
except Exception: pass
""",
    )

    pids = {int(line) for line in marks.read_text().split()}
    assert len(pids) >= 2, "a worker and the caller"
    assert daemon_of(shared_daemon).pid not in pids


@pytest.mark.parametrize("fields", ["isolation='docker'", "imageName='python:3.11'"])
def test_t46_a_container_is_refused_before_anything_runs(shared_daemon: Host, fields: str) -> None:
    marks = shared_daemon.project / "t46"
    program = f"@remote(CpuLiveServerless(name='c', {fields}))\ndef f(path): open(path, 'w').close()\ntry: f({os.fspath(marks)!r}).result()\nexcept SubmissionRefused as error: print(json.dumps(str(error)))"
    told = shared_daemon.run(HEAD + program).json

    assert "cannot run in a container" in told
    assert not marks.exists()


# -- names, files, secrets ---------------------------------------------------------------------------------

def test_t44_what_a_worker_claims_to_have_left_behind_costs_no_memory(tmp_path: Path) -> None:
    spool, worker, token, size = Spool(tmp_path), "wa-1", "token", 1 << 40
    outcomes, output = spool.open(worker)
    words = {"kind": "returned", "message": "", "error_type": "", "traceback": "", "exit_code": None, "attempt": token, "payload_size": size}
    head = json.dumps(words).encode()
    os.write(outcomes, len(head).to_bytes(4, "big") + head + b"x")
    os.ftruncate(outcomes, 4 + len(head) + size)
    os.write(outcomes, wire.OUTCOME_MARK)
    os.write(output, struct.pack("!BI", 1, 5) + b"hello")
    os.ftruncate(output, size)
    wire.close_all((outcomes, output))

    end = spool.outcome(worker, token, None)
    assert end is not None
    assert isinstance(end.payload, int)
    found = os.fstat(end.payload)
    os.close(end.payload)
    assert (found.st_size, found.st_blocks < 1024) == (size, True), "a hole stays one"
    offset, last, printed = 0, -1, []
    while last < offset:
        last = offset
        records, offset = spool.output(worker, last)
        printed += records
    assert printed == [(1, b"hello")]
    assert offset < 1 << 30


HOSTILE_NAMES = ["..", "../x", "/etc/passwd", "a/b", "", ".", "a\0b", "a" * 65, "A" * 32, "\N{FULLWIDTH FULL STOP}" * 2, "0" * 32 + "\n", "0" * 32 + ".x"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_t38_nothing_but_an_id_becomes_a_path(tmp_path: Path, name: str) -> None:
    blobs = Blobs(Paths(tmp_path, tmp_path, tmp_path / "config.toml"), 0)
    spool = Spool(tmp_path)
    for make in (blobs.result_path, spool.outcomes_path, spool.output_path, lambda bad: blobs.content_path(1000, bad), lambda bad: blobs.secret_path(1000, bad)):
        with pytest.raises(BadRequest, match="cannot use"):
            make(name)


@pytest.mark.parametrize("name", ["../" * 20 + "tmp/x", "/etc/passwd", ".." * 32, "0" * 63 + "/"])
def test_t38_a_digest_that_is_a_path_is_refused_at_the_door(shared_daemon: Host, name: str) -> None:
    before = sorted(path for path in shared_daemon.state.rglob("*") if path.is_file() and path.parent.name != "remoted")
    with raw(shared_daemon) as client:
        client.send({"op": "put", "digest": name, "role": "code"}, b"data")
        refused = client.until("refused").header
    assert refused["code"] in ("BAD_NAME", "BAD_DIGEST", "BAD_FRAME", "BAD_HEADER", "BAD_REQUEST"), refused
    assert sorted(path for path in shared_daemon.state.rglob("*") if path.is_file() and path.parent.name != "remoted") == before


def test_t39_nobody_else_may_read_the_state(shared_daemon: Host) -> None:
    shared_daemon.run(HEAD + "@remote(queue)\ndef f():\n    print('private')\n    return 1\nf().result().unwrap()")

    state = shared_daemon.state / "remoted"
    folders = [state, *(path for path in state.iterdir() if path.is_dir())]
    assert len(folders) > 3
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folders} == {path.name: "0o700" for path in folders}


def test_t40_no_command_line_shows_an_argument_or_a_variable(shared_daemon: Host) -> None:
    """Taken while the body runs, of every process of the host."""
    gate = shared_daemon.project / "t40"
    process = shared_daemon.popen(
        HEAD
        + """
@remote(queue, env={"TOKEN": "5ec" + "ret-variable"})
def f(argument, path):
    open(path + ".began", "w").close()
    while not os.path.exists(path): time.sleep(0.01)
    return [argument, os.environ["TOKEN"]]
print(json.dumps(f("5ec" + "ret-argument", sys.argv[1]).result().unwrap()))
""",
        str(gate),
    )
    wait_until(Path(f"{gate}.began").exists, 20)
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes())
        except OSError:  # it has ended
            continue
    gate.touch()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "5ecret-argument" in out
    assert "5ecret-variable" in out
    assert not [line for line in lines if b"5ecret" in line]


# -- time, supply ------------------------------------------------------------------------------------------


def test_t53_one_module_asks_for_the_wall_clock() -> None:
    """So that what must not jump can be seen to use another clock; the worker and ``remotectl`` only show it."""
    asking = re.compile(r"\btime\.time\(|\bdatetime\.\w*now\(|\.utcnow\(")
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "remoted").rglob("*.py")
        if asking.search(path.read_text(encoding="utf-8")) and path.relative_to(ROOT / "remoted").parts[0] not in ("worker", "cli")
    }
    assert found == {"remoted/clock.py"}


def test_t60_every_locked_package_has_hashes() -> None:
    lock = (ROOT / "uv.lock").read_text(encoding="utf-8")
    files = re.findall(r"\{ url = [^}]*\}", lock)

    assert len(files) > 50
    assert [entry for entry in files if 'hash = "sha256:' not in entry] == []


def test_t60_the_daemon_has_no_network_connection_of_its_own(shared_daemon: Host) -> None:
    shared_daemon.run(HEAD + "@remote(queue)\ndef f(): return 1\nf().result().unwrap()")

    assert daemon_of(shared_daemon).net_connections("inet") == []
