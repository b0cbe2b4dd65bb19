"""C03: many users, one daemon. Each sees his own, runs as himself, and is who the kernel says."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import wait_until
from tests.root.system_host import SHARED, SystemHost, User, accounts, system_host

pytestmark = pytest.mark.root

HEAD = """
import json, os, sys, threading
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer
queue = CpuLiveServerless(name="queue", workersMax=1)
direct = CpuLiveLoadBalancer(name="direct", workersMax=1)
"""
WHO = (
    HEAD
    + """
@remote(queue)
def who(): return [os.getresuid(), os.getresgid(), sorted(os.getgroups())]
@remote(direct)
def who_directly(): return [os.getresuid(), os.getresgid(), sorted(os.getgroups())]
print(json.dumps([who().result().unwrap(), who_directly().result()]))
"""
)


@pytest.mark.parametrize("groups", [(), (60005,), tuple(range(61000, 61033)), tuple(range(62000, 62300))], ids=["none", "one", "33", "300"])
def test_t22_a_body_has_exactly_its_callers_ids_and_groups(house: SystemHost, groups: tuple[int, ...]) -> None:
    """300 groups are more than Python's getsockopt can return."""
    caller = house.user("alice", 60001, 60010, groups)

    assert caller.run(WHO).json == [[[60001] * 3, [60010] * 3, list(groups)]] * 2


def test_t22_users_with_accounts_keep_their_groups_too() -> None:
    with accounts("rmtest-a", "rmtest-b") as (first, second), system_host(config="") as host:
        host.start()
        for account in (first, second):
            user = host.user(account.pw_name, account.pw_uid, account.pw_gid, (account.pw_gid, 60005))
            assert user.run(WHO).json[0] == [[account.pw_uid] * 3, [account.pw_gid] * 3, sorted({account.pw_gid, 60005})]


# -- who may come in ---------------------------------------------------------------------------------------

ONCE = (
    HEAD
    + """
@remote(queue)
def f(): return 1
try: print(json.dumps(f().result().unwrap()))
except SubmissionRefused as error: print(json.dumps([error.code, str(error)]))
except DaemonUnreachable as error: print(json.dumps(["UNREACHABLE", str(error)]))
"""
)


def test_t03_a_uid_without_account_is_refused_unless_that_is_allowed() -> None:
    with system_host(config="") as host:
        stranger = host.start().user("stranger", 60001)
        told = stranger.run(ONCE).json
        shown = stranger.remotectl("status", check=False)

    assert "allow_unknown_uids" in str(told)
    assert shown.code != 0
    assert "uid 60001" in shown.err


LIST = """
import os, socket
sock = socket.socket(socket.AF_UNIX); sock.connect(os.environ["REMOTED_SOCKET"] + "/api.sock")
sock.sendall(b"GET /v1/jobs?all=1 HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
while data := sock.recv(65536): print(data.decode(), end="")
sock.close()
"""


def test_t03_a_user_that_a_namespace_does_not_map_is_nobody(house: SystemHost, alice: User) -> None:
    """In a new user namespace the daemon sees the outer uid, and one that is mapped to nobody is not served."""
    nobody = house.user("nobody", 65534)

    assert "FORBIDDEN" in str(nobody.run(ONCE).json) or "serves another user" in str(nobody.run(ONCE).json)
    assert alice.run(ONCE).json == 1
    mapped = alice.popen_command(["unshare", "--user", "--map-root-user", str(house.python), "-c", LIST])
    out, err = mapped.communicate(timeout=60)
    assert '"name":"f"' in out, err  # who is root in there is alice here, with alice's jobs


def test_t04_root_is_refused_to_run_and_may_administer(house: SystemHost) -> None:
    root = house.user("root", 0)

    code, text = root.run(ONCE).json
    assert code == "ROOT_REFUSED"
    assert "allow_root" in text
    assert root.remotectl("config", "show").code == 0


def test_t04_others_may_not_administer(alice: User) -> None:
    for verb in (["config", "show"], ["stop"]):
        refused = alice.remotectl(*verb, check=False)
        assert refused.code != 0
        assert "administrator" in refused.err


def test_t04_root_may_run_where_the_configuration_says_so() -> None:
    with system_host("[users]\nallow_root = true\n") as host:
        assert host.start().user("root", 0).run(ONCE).json == 1


# -- what others see ---------------------------------------------------------------------------------------


def test_t10_another_users_job_is_as_unknown_as_one_that_never_was(alice: User, bob: User) -> None:
    job = alice.run(HEAD + "@remote(queue)\ndef f(): return 1\nhandle = f()\nhandle.result()\nprint(json.dumps(handle.id))").json
    find = (
        HEAD
        + """
def ask(job):
    try: return [Job.from_id(job).result().output]
    except SubmissionRefused as error: return [error.code, str(error).replace(job, "ID")]
print(json.dumps([ask(sys.argv[1]), ask("0" * 32)]))
"""
    )

    assert alice.run(find, job).json[0] == [1]
    foreign, unknown = bob.run(find, job).json
    assert foreign == unknown
    for verb in ("show", "logs", "cancel", "retry", "wait"):
        answers = [bob.remotectl(verb, asked, check=False) for asked in (job, "0" * 32)]
        assert answers[0].code == answers[1].code != 0
        assert answers[0].err.replace(job, "ID") == answers[1].err.replace("0" * 32, "ID")


def test_t10_lists_show_ones_own_only(alice: User, bob: User) -> None:
    alice.run(HEAD + "@remote(CpuLiveServerless(name='alices-pool'))\ndef alices_function(): return 1\nalices_function().result()")
    own = alice.remotectl("ps", "-a", "--json").out + alice.remotectl("status", "--json").out + alice.remotectl("workers", "--json").out
    others = "".join(bob.remotectl(*asked, "--json").out for asked in (["ps", "-a"], ["status"], ["workers"], ["gpus"], ["env", "list"]))  # what has ended is nobody's

    assert "alices" in own
    assert "alices" not in others


def test_t35_warm_workers_are_never_shared(house: SystemHost, alice: User, bob: User) -> None:
    """Not between users, and not between two sets of groups of one."""
    other_groups = house.user("alice", 60001, groups=(60005,))
    program = HEAD + "@remote(queue)\ndef pid(): return os.getpid(), os.getuid()\nprint(json.dumps(pid().result().unwrap()))"
    first, again, other, third = (user.run(program).json for user in (alice, alice, other_groups, bob))

    assert first == again
    assert [first[1], other[1], third[1]] == [60001, 60001, 60002]
    assert len({first[0], other[0], third[0]}) == 3


def test_t13_the_cap_of_connections_is_each_users_own() -> None:
    with system_host("[users]\nallow_unknown_uids = true\n[limits]\nconnections_per_uid = 20\n") as host:
        host.start()
        flood = host.user("flood", 60003).popen(
            """
            import os, socket, sys
            held = []
            for _ in range(400):
                held.append(socket.socket(socket.AF_UNIX)); held[-1].connect(os.environ["REMOTED_SOCKET"] + "/data.sock")
            print("flooded", flush=True)
            sys.stdin.read()
            import time; time.sleep(60)
            """
        )
        assert flood.stdout is not None
        assert flood.stdout.readline() == "flooded\n"
        assert host.user("bob", 60002).run(ONCE).json == 1
        flood.kill()
        flood.communicate()


SILENT = """
import os, socket, sys
held = []
for door in ("data.sock", "api.sock"):
    for _ in range(20):
        held.append(socket.socket(socket.AF_UNIX)); held[-1].connect(os.environ["REMOTED_SOCKET"] + "/" + door)
print("silent", flush=True)
import time; time.sleep(60)
"""
GREETED = """
import os, socket, sys
sys.path.insert(0, os.environ["PYTHONPATH"])
from remoted_client import wire
held = []
for _ in range(20):
    held.append(socket.socket(socket.AF_UNIX)); held[-1].connect(os.environ["REMOTED_SOCKET"] + "/data.sock")
    wire.send(held[-1], wire.encode({"op": "hello", "protocol": wire.PROTOCOL, "started": 0}))
    assert held[-1].recv(1)
print("greeted", flush=True)
import time; time.sleep(60)
"""


def test_t13_many_uids_of_one_user_fill_the_house_with_silence_and_others_come_in() -> None:
    """As newuidmap(1) lends them: none has an account."""
    with accounts("remoted-bob") as [account], system_host("[limits]\nconnections_per_uid = 20\nconnections_total = 40\n") as host:
        host.start()
        bob = host.user(account.pw_name, account.pw_uid, account.pw_gid)
        silent = [host.user(f"sub{number}", 100_000 + number).popen(SILENT) for number in range(5)]
        assert [each.stdout.readline() for each in silent if each.stdout is not None] == ["silent\n"] * 5
        assert bob.run(ONCE).json == 1
        assert bob.remotectl("ps").code == 0
        for each in silent:
            each.kill()
            each.communicate()


def test_t13_who_has_few_connections_has_a_reserve_when_others_have_all() -> None:
    with system_host("[users]\nallow_unknown_uids = true\n[limits]\nconnections_per_uid = 20\nconnections_total = 40\n") as host:
        host.start()
        greeted = [host.user(f"user{number}", 60010 + number).popen(GREETED) for number in range(2)]
        assert [each.stdout.readline() for each in greeted if each.stdout is not None] == ["greeted\n"] * 2
        assert host.user("bob", 60002).run(ONCE).json == 1
        for each in greeted:
            each.kill()
            each.communicate()


# -- the way in --------------------------------------------------------------------------------------------


def test_t11_everybody_reaches_the_sockets_and_nobody_else_can_make_them(house: SystemHost) -> None:
    assert stat.S_IMODE(house.sockets.stat().st_mode) == 0o755
    assert house.sockets.stat().st_uid == 0
    for name in ("api.sock", "data.sock"):
        assert stat.S_IMODE((house.sockets / name).stat().st_mode) == 0o666


def test_t39_nobody_else_may_read_the_state(house: SystemHost, alice: User) -> None:
    """Traversed on the way to the worker's program, and nothing else."""
    listed = alice.popen_command(["ls", str(house.state)])
    listed.communicate()
    assert listed.returncode != 0
    for folder in house.state.iterdir():
        mode = stat.S_IMODE(folder.stat().st_mode)
        assert mode & 0o022 == 0, folder
        assert mode & 0o077 == 0 or folder.name == "runtime", folder


def _in_run(house: SystemHost, run: Path, user: User) -> tuple[int, str, str]:
    """A script of the user's who has said nothing about sockets, on a host whose /run is that folder."""
    script = user.home / "plain.py"
    script.write_text(ONCE, encoding="utf-8")
    os.chown(script, user.uid, user.gid)
    inner = f"mount --bind {run} /run && exec setpriv --reuid {user.uid} --regid {user.gid} --clear-groups {house.python} {script}"
    environ = {name: value for name, value in user.environ.items() if name != "REMOTED_SOCKET"}
    done = subprocess.run(["unshare", "--mount", "sh", "-ec", inner], env=environ, capture_output=True, text=True, timeout=90, check=False)
    return done.returncode, done.stdout, done.stderr


def test_c03_the_client_finds_the_systems_daemon_first(house: SystemHost, bob: User) -> None:
    code, out, err = _in_run(house, house.prefix / "run", bob)

    assert (code, json.loads(out)) == (0, 1), err
    assert "started your own daemon" not in err


FAKE = """
import os, socket, sys
folder = sys.argv[1]
sock = socket.socket(socket.AF_UNIX)
os.setgid(60001); os.setuid(60001)
sock.bind(folder + "/data.sock"); os.chmod(folder + "/data.sock", 0o777); sock.listen()
print("listening", flush=True)
connection, _ = sock.accept()
print(connection.recv(1000), flush=True)
"""


def test_t08_a_fake_of_the_systems_daemon_hears_nothing(house: SystemHost, bob: User) -> None:
    fake_run = house.prefix / "fake"
    (fake_run / "remoted").mkdir(parents=True)
    (fake_run / "remoted").chmod(0o777)
    fake = subprocess.Popen([sys.executable, "-S", "-c", FAKE, str(fake_run / "remoted")], stdout=subprocess.PIPE, cwd="/")
    try:
        assert fake.stdout is not None
        assert fake.stdout.readline() == b"listening\n"
        _, out, _ = _in_run(house, fake_run, bob)
        assert "uid 60001" in out
        assert fake.communicate(timeout=20)[0] == b"b''\n"
    finally:
        fake.kill()
        fake.wait()
        shutil.rmtree(fake_run)


# -- what root reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("owner", "mode", "says"), [(60001, 0o644, "belongs to uid 60001"), (0, 0o666, "others than its owner may write")])
def test_t31_a_configuration_that_is_not_roots_alone_is_refused(owner: int, mode: int, says: str) -> None:
    with system_host() as host:
        config = host.prefix / "etc/remoted/config.toml"
        os.chown(config, owner, owner)
        config.chmod(mode)
        done = subprocess.run([str(host.python), "-I", "-m", "remoted", "--system", "--prefix", str(host.prefix)], capture_output=True, text=True, cwd="/", timeout=30, check=False)

    assert done.returncode == 1
    assert says in done.stderr


def test_t31_a_daemon_of_the_systems_imports_nothing_from_folders_of_traps(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("json", "asyncio", "sitecustomize", "usercustomize", "pydantic", "tomllib"):
        (trap / f"{name}.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'a').write({name!r})\nraise SystemExit(3)\n", encoding="utf-8")
    with system_host() as host:
        host.start(PYTHONPATH=str(trap), PYTHONSTARTUP=str(trap / "json.py"), PYTHONHOME="")
        assert host.user("bob", 60002).run(ONCE).json == 1

    assert not (tmp_path / "sprung").exists()


def test_c09_a_job_that_runs_while_the_daemon_is_exchanged_comes_home(alice: User, house: SystemHost) -> None:
    """Its worker can write nowhere that is the daemon's, and leaves its outcome through a descriptor all the same."""
    go = alice.home / "go"
    program = (
        HEAD
        + """
@remote(queue, max_retries=0)
def long(path):
    print("begun", flush=True)
    import time
    while not os.path.exists(path): time.sleep(0.01)
    print("seen", flush=True)
    return "x" * 200_000
handle = long.options(detach=True)(sys.argv[1])
print(json.dumps(handle.id))
"""
    )
    job = alice.run(program, str(go)).json
    wait_until(lambda: "begun" in alice.remotectl("logs", job, check=False).out, 30)
    assert house.process is not None
    house.process.terminate()
    house.process.wait(20)
    go.touch()
    house.start()

    found = alice.run(HEAD + "out = Job.from_id(sys.argv[1]).result()\nprint(json.dumps([out.status, len(out.output)]))", job).json
    assert found == ["COMPLETED", 200_000]
    assert "seen" in alice.remotectl("logs", job).out
    assert not [path for path in (house.state / "outcomes").iterdir() if path.suffix == ".outcomes" and path.stat().st_size]


def test_the_daemons_own_python_can_be_used_by_everybody() -> None:
    assert SHARED.stat().st_mode & 0o005 == 0o005
