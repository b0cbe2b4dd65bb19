"""C09, T52: a newer version of ours over the one that runs, and an older one, and one that does not start. Debian 12, booted.

The newer one is this tree with another version, another program of workers and a schema that is one higher.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ROOT
from tests.root.booted import booted, copy_sources
from tests.root.system_host import TREES

pytestmark = [pytest.mark.root, pytest.mark.timeout(500)]
QUEUED = 200

JOB = """
import json, os, sys, time
from remoted_client import CpuLiveLoadBalancer, CpuLiveServerless, Job, remote
queue, other, direct = CpuLiveServerless(name="q", workersMax=1), CpuLiveServerless(name="other", workersMax=1), CpuLiveLoadBalancer(name="d", workersMax=1)
def edition():
    import remoted_worker.runtime
    return getattr(remoted_worker.runtime, "EDITION", 1)
@remote(queue, max_retries=0)
def tick(path):
    count = 0
    while not os.path.exists(path):
        print("tick", count, flush=True)
        count += 1
        time.sleep(0.02)
    return [count, os.getpid(), edition()]
@remote(queue, max_retries=0)
def note(number):
    with open(os.path.expanduser("~/noted"), "a") as file: file.write(f"{number}\\n")
    return number
@remote(other, max_retries=0)
def warm():
    sys.seen = getattr(sys, "seen", 0) + 1
    return [os.getpid(), sys.seen, edition()]
@remote(direct)
def call(number): return [number, os.getpid()]
verb, *rest = sys.argv[1:]
if verb == "warm": print(json.dumps(warm().result().unwrap()))
if verb == "begin":
    job = tick.options(detach=True)(*rest)
    while b"tick" not in os.popen(f"remotectl logs {job.id} 2>&1").read().encode(): time.sleep(0.05)
    print(json.dumps(job.id))
if verb == "many": print(json.dumps([note.options(detach=True)(number).id for number in range(int(*rest))]))
if verb == "outcome":
    out = Job.from_id(*rest).result()
    print(json.dumps([out.status, out.state_reason, out.output, out.stdout]))
if verb == "outcomes": print(json.dumps([[out.status, out.output, out.attempts] for out in (Job.from_id(id).result() for id in json.loads(*rest))]))
if verb == "lease":
    made = 0
    pids = set()
    while not os.path.exists(*rest):
        number, pid = call(made).result()
        assert number == made
        pids.add(pid)
        made += 1
        if made == 10: open(rest[0] + ".begun", "w").close()
    print(json.dumps([made, sorted(pids)]))
"""

TRIAL = (
    r"""
job() { u=$1; shift; as $u /v/bin/python /trial/job.py "$@" 2>>/trial/log; }
version() { remotectl version --json | /v/bin/python -c 'import json, sys; found = json.load(sys.stdin); print(json.dumps([found["version"], found["daemon"]["version"], found["daemon"]["pid"]]))'; }
python3 -m venv --without-pip /v; unpacked=/wheels/uv-*.whl; python3 -m zipfile -e $unpacked /trial/uv; chmod +x /trial/uv/uv-*/scripts/uv
/trial/uv/uv-*/scripts/uv pip install --quiet --python /v/bin/python "remoted[daemon] @ file://$(echo /wheels/first/*.whl)"
say first "$(/v/bin/remotectl install --json 2>&1)"; say first_version "$(version)"
say warm "$(job bob warm)"
J=$(job alice begin /home/alice/go | tail -n 1 | tr -d '"'); IDS=$(job alice many """
    + str(QUEUED)
    + r""" | tail -n 1)
job bob lease /home/bob/enough >/trial/lease & LEASE=$!
while [ ! -e /home/bob/enough.begun ]; do sleep 0.05; done
say second "$(/v/bin/remotectl install --source /wheels/second/*.whl --json 2>&1)"; say second_version "$(version)"
say schemas "$(cd /var/lib/remoted; ls -d *.schema-*)"; say programs "$(ls /var/lib/remoted/runtime | wc -l)"
say warm_second "$(job bob warm)"; say new "$(job alice warm)"
say older "$(/v/bin/remotectl install --source /wheels/first/*.whl 2>&1)"; say older_version "$(version)"
say unloadable "$(/v/bin/remotectl install --source /wheels/unloadable/*.whl 2>&1)"
say broken "$(/v/bin/remotectl install --source /wheels/broken/*.whl 2>&1)"; say broken_version "$(version)"
say folders "$(ls -d /opt/remoted-*)"; say links "$(readlink /opt/remoted) $(systemctl show -p ExecStart --value remoted | grep -o '/opt/[^ ;]*/bin/python' | head -n 1)"
say warm_broken "$(job bob warm)"
as bob touch /home/bob/enough; wait $LEASE; say lease "$(cat /trial/lease)"
as alice touch /home/alice/go; say ticks "$(job alice outcome $J)"
say outcomes "$(job alice outcomes "$IDS")"; say noted "$(cat /home/alice/noted)"
remotectl drain --why upgrade; RUN="$(as alice remotectl run -d -- sh -c 'echo one') $(as alice remotectl run -d -- sh -c 'echo two')"
readlink /opt/remoted >/trial/editions; say again "$(/v/bin/remotectl install --source /wheels/second/*.whl --json 2>&1)"; readlink /opt/remoted >>/trial/editions
remotectl resume; say editions "$(cat /trial/editions)"; say commands "$(for id in $RUN; do as alice remotectl wait --json $id; as alice remotectl logs $id; done)"
AGAIN=$(as alice remotectl retry ${RUN% *}); say retried "$(as alice remotectl wait $AGAIN; as alice remotectl logs $AGAIN)"
systemctl stop remoted-workers.slice; systemctl restart remoted; say programs_after "$(ls /var/lib/remoted/runtime | wc -l)"
journalctl -u remoted --no-pager >/trial/journal
say uninstalled "$(/v/bin/remotectl uninstall --json 2>&1)"; say left "$(ls -d /opt/remoted* 2>/dev/null)"
"""
)


@pytest.fixture(scope="module")
def said() -> Iterator[dict[str, str]]:
    with booted("bookworm", TRIAL, JOB, _make_editions) as found:
        yield found


def _make_editions(tree: Path) -> None:
    """Four wheels of this checkout, and those of what they need."""
    shutil.copytree(TREES / "wheels", tree / "wheels")
    (tree / "etc/uv").mkdir()
    (tree / "etc/uv/uv.toml").write_text('no-index = true\nfind-links = ["/wheels"]\n', encoding="ascii")
    for name in ("first", "second", "broken", "unloadable"):
        source = tree / "trial" / name
        copy_sources(source)
        if name != "first":
            _make_newer(source)
        if name == "broken":
            _append(source / "remoted/app.py", 'async def _fail(daemon): raise RuntimeError("this edition does not start")\nDaemon.run = _fail')
        if name == "unloadable":
            _append(source / "remoted/app.py", 'raise ImportError("failed to map segment from shared object")')
        subprocess.run([str(ROOT / ".venv/bin/uv"), "build", "--quiet", "--wheel", "--out-dir", str(tree / "wheels" / name), str(source)], check=True)


def _make_newer(source: Path) -> None:
    store = source / "remoted/store.py"
    text = store.read_text(encoding="utf-8")
    [schema] = re.findall(r"^SCHEMA_VERSION = (\d+)$", text, re.MULTILINE)
    store.write_text(text.replace(f"SCHEMA_VERSION = {schema}\n", f"SCHEMA_VERSION = {int(schema) + 1}\n"), encoding="utf-8")
    _append(source / "remoted/store.sql", f"-- name: migrate_{schema}\n-- Something new.\nALTER TABLE usage ADD COLUMN trial INTEGER NOT NULL DEFAULT 0;")
    _append(source / "remoted/worker/runtime.py", "EDITION = 2")
    for file in (source / "pyproject.toml", source / "remoted/__init__.py"):
        file.write_text(re.sub(r'^(__version__|version) = ".*"$', r'\1 = "99.1"', file.read_text(encoding="utf-8"), flags=re.MULTILINE), encoding="utf-8")


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(f"\n{text}\n")


def _read(said: dict[str, str], name: str) -> Any:
    return json.loads(said[name])


def test_c09_an_upgrade_puts_the_newer_daemon_there(said: dict[str, str]) -> None:
    old, new = _read(said, "first_version"), _read(said, "second_version")

    assert old[0] == old[1] != "99.1"
    assert new[:2] == ["99.1", "99.1"]
    assert new[2] != old[2]
    assert ".schema-" in said["schemas"], "the database was not changed"


def test_c09_a_warm_worker_goes_on_over_an_upgrade_and_new_ones_run_the_new_program(said: dict[str, str]) -> None:
    before, after, at_last, new = (_read(said, name) for name in ("warm", "warm_second", "warm_broken", "new"))

    assert [before[0], before[1] + 1, 1] == after
    assert [before[0], before[1] + 2, 1] == at_last
    assert new[2] == 2


def test_c09_a_running_job_prints_on_over_an_upgrade(said: dict[str, str]) -> None:
    status, _, (count, _, edition), stdout = _read(said, "ticks")

    assert (status, edition) == ("COMPLETED", 1)
    assert stdout.splitlines() == [f"tick {number}" for number in range(count)]


def test_c09_a_lease_goes_on_over_an_upgrade(said: dict[str, str]) -> None:
    made, pids = _read(said, "lease")

    assert made > 10
    assert len(pids) == 1


def test_c09_two_hundred_queued_jobs_each_run_once_after_an_upgrade(said: dict[str, str]) -> None:
    assert _read(said, "outcomes") == [["COMPLETED", number, 1] for number in range(QUEUED)]
    assert said["noted"].split() == [str(number) for number in range(QUEUED)]


def test_c09_commands_that_wait_over_an_upgrade_run_in_the_edition_that_is_there_then(said: dict[str, str]) -> None:
    old, new = said["editions"].split()

    assert old != new
    assert said["commands"].count("COMPLETED") == 2, said["commands"]
    assert [word for word in said["commands"].split() if word in ("one", "two")] == ["one", "two"]
    assert "one" in said["retried"].split(), said["retried"]


def test_t52_an_older_version_is_refused_and_nothing_of_it_is_left(said: dict[str, str]) -> None:
    assert "was written by a newer remoted" in said["older"]
    assert _read(said, "older_version") == _read(said, "second_version"), "the daemon was restarted"


def test_c09_a_version_that_does_not_start_leaves_the_one_before_in_force(said: dict[str, str]) -> None:
    before, after = _read(said, "second_version"), _read(said, "broken_version")

    assert "this edition does not start" in said["broken"]
    assert "99.1 is in force again" in said["broken"]
    assert after[:2] == before[:2]
    [folder] = said["folders"].split()
    assert said["links"].split() == [folder, f"{folder}/bin/python"]


def test_c09_a_version_that_cannot_be_loaded_is_not_even_tried(said: dict[str, str]) -> None:
    assert "cannot install: what was made in /opt does not run: ImportError: failed to map segment from shared object" in said["unloadable"]


def test_c09_the_program_of_old_workers_stays_as_long_as_they_do(said: dict[str, str]) -> None:
    assert (said["programs"].strip(), said["programs_after"].strip()) == ("2", "1")


def test_c01_uninstall_takes_every_version_away(said: dict[str, str]) -> None:
    assert said["left"].strip() == ""
