"""C01, C03, C09, T42, T43, T49, T50: a computer of its own with cgroup v2, its limits, and what it bears: restarts and cuts of its power.

One computer for all of these tests, which use it in this order. REMOTED_TEST_RESTARTS and REMOTED_TEST_CUTS say how often.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from tests.root import vm_load
from tests.root.vm import Machine, machine, make_image
from tests.root.vm_load import Load, Verdict

pytestmark = [pytest.mark.root, pytest.mark.timeout(7200)]

RESTARTS = int(os.environ.get("REMOTED_TEST_RESTARTS", "3"))
CUTS = int(os.environ.get("REMOTED_TEST_CUTS", "3"))
TASKS = 60
#: Of two users who share a group, one without, and one whom no passwd entry knows.
ALICE, BOB, CAROL, STRANGER = 1001, 1002, 1003, 60004
SETUP = f"""
groupadd lab
useradd --create-home --uid {ALICE} --groups lab alice
useradd --create-home --uid {BOB} --groups lab bob
useradd --create-home --uid {CAROL} carol
mkdir /home/{STRANGER}; chown {STRANGER}:{STRANGER} /home/{STRANGER}
chmod 700 /home/*
"""
CONFIG = f"[users]\nallow_unknown_uids = true\n[limits]\nworker_tasks = {TASKS}\nfree_disk_reserve_bytes = 67108864\n"

HEAD = """
import json, os, subprocess, sys, time
from remoted_client import *
from remoted_client import remote
queue = CpuLiveServerless(name="queue", workersMax=1)
small = CpuLiveServerless(name="small", workersMax=1, template=PodTemplate(memory_gb=0.2))
def read(path):
    with open(path) as file: return file.read()
def group(name): return read("/sys/fs/cgroup" + read("/proc/self/cgroup").strip().split("::")[1] + "/" + name)
"""
SCRIPTS = {
    "who": """
@remote(queue)
def who():
    with open(os.path.expanduser("~/secret"), "w") as file: file.write("mine")
    return [os.getuid(), sorted(os.getgroups()), read("/proc/self/cgroup"), group("memory.oom.group")]
job = who()
print(json.dumps([job.result().unwrap(), job.id]))
""",
    "open": """
import errno
def tried(path):
    try: os.close(os.open(path, os.O_RDONLY))
    except OSError as error: return errno.errorcode[error.errno]
    return "opened"
@remote(queue)
def look(path): return [tried(path), tried("/dev/null")], os.getpid()
print(json.dumps(look(sys.argv[1]).result().unwrap()))
""",
    "look": """
def tried(act):
    try: act()
    except Exception as error: return type(error).__name__
@remote(queue)
def look(path): return tried(lambda: read(path)), tried(lambda: os.listdir("/var/lib/remoted/contents"))
print(json.dumps([look(sys.argv[2]).result().unwrap(), tried(lambda: Job.from_id(sys.argv[1]).result())]))
""",
    "hog": """
@remote(small, max_retries=0)
def hog(): return len([b"x" * (8 << 20) for _ in range(100)])
@remote(small, max_retries=0)
def child():
    done = subprocess.run([sys.executable, "-c", "b'x' * (800 << 20)"])
    return done.returncode
out, other = hog().result(), child().result()
print(json.dumps([[out.status, out.state_reason, out.error], [other.status, other.state_reason, other.output]]))
""",
    "bomb": """
@remote(queue, max_retries=0)
def bomb():
    while True:
        if os.fork() == 0:
            while True: time.sleep(60)
@remote(queue)
def after(): return 1
out = bomb().result()
print(json.dumps([out.status, out.error, after().result().unwrap()]))
""",
    "burn": """
@remote(CpuLiveServerless(name="one-cpu", workersMax=1, instanceIds=[CpuInstanceType.CPU3G_1_4]))
def burn():
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(3)]
    while "nr_throttled 0\\n" in group("cpu.stat"): time.sleep(0.01)
    for process in busy: process.kill(); process.wait()
    return group("cpu.max")
print(json.dumps(burn().result().unwrap()))
""",
    "fill": """
@remote(queue, max_retries=0)
def fill(go):
    fd = os.open(os.path.expanduser("~/filler"), os.O_WRONLY | os.O_CREAT)
    free = os.statvfs("/").f_bavail * os.statvfs("/").f_frsize
    os.posix_fallocate(fd, 0, free - (1 << 20))
    os.close(fd)
    print("there is no room for this line", flush=True)
    while not os.path.exists(go): time.sleep(0.05)
    os.unlink(os.path.expanduser("~/filler"))
print(json.dumps(fill(os.path.expanduser("~/go")).result().status))
""",
    "flood": """
import socket
held = []
for number in range(400):
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].connect("/run/remoted/data.sock" if number % 2 else "/run/remoted/api.sock")
print("flooded", flush=True)
while not os.path.exists(os.path.expanduser("~/dry")): time.sleep(0.05)
""",
    "once": """
@remote(queue)
def once(data): return len(data)
try: print(json.dumps(once(bytes(int(sys.argv[1]))).result().unwrap()))
except SubmissionRefused as error: print(json.dumps([error.code, str(error)]))
""",
}
FILES = {
    "etc/remoted/config.toml": CONFIG,
    "etc/systemd/system/remoted.service.d/trial.conf": "[Service]\nWatchdogSec=15\n",
    "trial/load.py": vm_load.SCRIPT,
    **{f"trial/{name}.py": HEAD + text for name, text in SCRIPTS.items()},
}


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """On, with the product installed as its administrator would."""
    with machine(make_image(tmp_path_factory.mktemp("vm"), SETUP, FILES)) as made:
        made.power_on()
        made.run("/v/bin/remotectl install --json")
        yield made


def _json(computer: Machine, script: str, *arguments: str, uid: int) -> object:
    return computer.end(computer.script(script, *arguments, uid=uid)).json


# -- users and their limits --------------------------------------------------------------------------------


def test_c03_four_users_run_as_themselves_in_scopes_of_version_2(computer: Machine) -> None:
    """Two share a group, one has no passwd entry; all homes are 0700. Nobody sees another's job, file or state."""
    clients = {uid: computer.script("who", uid=uid) for uid in (ALICE, BOB, CAROL, STRANGER)}
    found = {uid: computer.end(client).json for uid, client in clients.items()}
    lab = int(computer.run("getent group lab | cut -d: -f3").out)

    assert {uid: who[:2] for uid, (who, _) in found.items()} == {ALICE: [ALICE, sorted((lab, ALICE))], BOB: [BOB, sorted((lab, BOB))], CAROL: [CAROL, [CAROL]], STRANGER: [STRANGER, [STRANGER]]}
    assert all(who[2].startswith("0::/remoted.slice/remoted-workers.slice/remoted-w") for who, _ in found.values())
    for uid in (BOB, STRANGER):
        (file, folder), job = _json(computer, "look", found[ALICE][1], "/home/alice/secret", uid=uid)
        assert (file, folder, job) == ("PermissionError", "PermissionError", "SubmissionRefused")


def test_c01_doctor_finds_the_limits_that_the_kernel_keeps_of_workers_that_live(computer: Machine) -> None:
    _json(computer, "who", uid=ALICE)

    checks = {check["name"]: check for check in json.loads(computer.run("remotectl doctor --json; true").out)["checks"]}
    assert checks["cgroups"]["ok"], checks["cgroups"]
    assert (checks["configuration"]["ok"], checks["worker program"]["ok"], checks["interpreter"]["ok"]) == (True, True, True)


def test_t43_want_of_memory_is_named_with_its_limit(computer: Machine) -> None:
    (status, reason, error), other = _json(computer, "hog", uid=ALICE)

    assert (status, reason) == ("FAILED", "OOM_RAM")
    assert "memory_gb" in error
    assert other == ["FAILED", "OOM_RAM", None]


def test_t42_a_fork_bomb_meets_its_limit_which_is_named(computer: Machine) -> None:
    status, error, after = _json(computer, "bomb", uid=BOB)

    assert (status, after) == ("FAILED", 1)
    assert f"{TASKS} processes and threads" in error


def test_f10_more_than_its_cpus_nobody_gets(computer: Machine) -> None:
    assert _json(computer, "burn", uid=CAROL) == "100000 100000\n"


def test_t47_cards_stay_closed_over_a_reload_of_systemd(computer: Machine) -> None:
    """No card is needed: the kernel asks about permission (EPERM) before it looks for a driver (ENXIO)."""
    computer.run("mknod -m 666 /dev/nvidia9 c 195 9")
    first = _json(computer, "open", "/dev/nvidia9", uid=ALICE)
    computer.run("systemctl daemon-reload")
    again = _json(computer, "open", "/dev/nvidia9", uid=ALICE)

    assert first == again, "the same warm worker"
    assert isinstance(again, list)
    assert again[0] == ["EPERM", "opened"]


def test_t13_t44_a_flood_of_sockets_and_a_full_disk_are_their_makers_own(computer: Machine) -> None:
    flood, filler = computer.script("flood", uid=BOB), computer.script("fill", uid=CAROL)
    computer.wait(lambda: "flooded" in flood.lines and any("output is not kept" in line for line in filler.lines), "no flood")
    refused = _json(computer, "once", str(1 << 20), uid=ALICE)
    computer.run("touch ~/go", CAROL)
    ended = computer.end(filler)
    served = _json(computer, "once", str(1 << 20), uid=ALICE)
    computer.run("touch ~/dry", BOB)

    assert refused[0] == "DISK_FULL"
    assert (ended.json, served) == ("COMPLETED", 1 << 20)
    assert computer.end(flood).code == 0


# -- what it bears -----------------------------------------------------------------------------------------

#: It serves; between two lives it has no pid.
READY = "until systemctl --quiet is-active remoted; do sleep 0.1; done; pid=$(systemctl show -p MainPID --value remoted); count() { systemctl show -p NRestarts --value remoted; }; before=$(count); "
FAULTS = {
    "restart": "systemctl restart remoted",
    "kill": f"{READY} kill -9 $pid",
    "hang": f"{READY} kill -STOP $pid; while [ $(count) = $before ]; do sleep 0.2; done",
}


def _explain(computer: Machine, verdict: Verdict) -> str:
    """What the daemon and the bodies have to say of what went wrong."""
    jobs = [word.partition(":")[0] for word in (*verdict.lost, *verdict.twice, *verdict.wrong)][:4]
    words = "|".join((*jobs, "systemd", "WARNING", "ERROR", "CRITICAL"))
    asked = "; ".join(f"grep {job} /home/*/tokens; for uid in {ALICE} {BOB} {STRANGER}; do setpriv --reuid $uid --clear-groups remotectl show {job} --json 2>/dev/null; done" for job in jobs)
    return f"{verdict}\n{computer.run(f'{asked}; journalctl -u remoted --no-pager -o short-precise | grep -E {words!r} | tail -n 150', check=False).out}"


def test_t49_restarts_under_load_lose_nothing_and_repeat_nothing(computer: Machine) -> None:
    """By the administrator, by SIGKILL, and by the watchdog of a daemon that hangs."""
    load = Load(computer, (ALICE, STRANGER), 15 * RESTARTS)
    for number in range(RESTARTS):
        load.wait_for((number + 0.5) / RESTARTS)
        computer.run(FAULTS[list(FAULTS)[number % len(FAULTS)]])
    load.finish()
    verdict = load.judge()

    assert verdict.is_good, _explain(computer, verdict)
    assert verdict.statuses.keys() == {"COMPLETED -"}, verdict


@pytest.mark.parametrize("number", range(CUTS))
def test_t50_what_was_acknowledged_outlives_a_cut_of_the_power(computer: Machine, number: int) -> None:
    """Each ends once; a body without retries has run once at most. What nobody had synced is gone: it was a real cut."""
    load = Load(computer, (BOB, STRANGER), 60)
    load.wait_for(0.2 + 0.5 * number / CUTS)
    computer.run("echo kept >/synced; sync /synced; echo lost >/unsynced")
    computer.cut_power()
    computer.power_on()
    verdict = load.judge()
    disk = computer.run("cat /synced; cat /unsynced; rm -f /synced /unsynced", check=False).out

    assert verdict.is_good, _explain(computer, verdict)
    assert verdict.acknowledged >= 24
    assert "kept" in disk
    assert "lost" not in disk


def test_t50_the_database_is_whole_and_knows_no_job_without_an_end(computer: Machine) -> None:
    ask = "import json, sqlite3; db = sqlite3.connect('/var/lib/remoted/remoted.sqlite3'); print(json.dumps([db.execute(q).fetchone()[0] for q in ('PRAGMA integrity_check', 'SELECT count(*) FROM jobs WHERE ended_at IS NULL', 'SELECT count(*) FROM attempts JOIN jobs ON seq = job WHERE attempts.ended_at IS NULL AND jobs.ended_at IS NULL')]))"
    for uid in (BOB, STRANGER):
        for job in json.loads(computer.run("remotectl ps --json", uid).out)["jobs"]:  # those of a cut that no client was told of
            computer.run(f"remotectl wait {job['id']}", uid, check=False)
    computer.run("systemctl stop remoted.socket remoted.service")

    assert json.loads(computer.run(f"python3 -c \"{ask}\"").out) == ["ok", 0, 0]
