"""C01, C09: a new Debian 12 and a new Debian 13, from `remotectl install` to `uninstall`, each booted in a tree of its own.

Everything of one is one boot: what happens in it is a script, and each test looks at what it wrote down.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import ROOT
from tests.root.booted import booted

pytestmark = [pytest.mark.root, pytest.mark.timeout(500)]
UNITS = ROOT / "systemd" / "system"

JOB = """
import json, os, sys, time
from remoted_client import CpuLiveLoadBalancer, CpuLiveServerless, Job, PodTemplate, remote
queue, direct = CpuLiveServerless(name="q", workersMax=1, template=PodTemplate(memory_gb=1)), CpuLiveLoadBalancer(name="d")
@remote(queue, max_retries=0)
def who():
    with open("/proc/self/cgroup") as file: groups = file.read()
    return [os.getuid(), os.getgroups(), groups]
@remote(direct)
def who_directly(): return os.getuid()
@remote(queue, max_retries=0)
def wait_for(path):
    print("begun in", os.getpid(), flush=True)
    while not os.path.exists(path): time.sleep(0.02)
    print("seen", flush=True)
    return f"done in {os.getpid()}"
@remote(queue, max_retries=0)
def warm():
    sys.seen = getattr(sys, "seen", 0) + 1
    return [os.getpid(), sys.seen]
@remote(CpuLiveServerless(name="hog", workersMax=1, template=PodTemplate(memory_gb=1)), max_retries=0)
def hog(): return len([bytearray(os.urandom(1 << 20)) for _ in range(1500)])
verb, *rest = sys.argv[1:]
if verb == "hog":
    out = hog().result()
    print(json.dumps([out.status, out.state_reason, out.error]))
if verb == "warm": print(json.dumps(warm().result().unwrap()))
if verb == "who": print(json.dumps([who().result().unwrap(), who_directly().result()]))
if verb == "begin":
    job = wait_for.options(detach=True)(*rest)
    while b"begun" not in os.popen(f"remotectl logs {job.id} 2>&1").read().encode(): time.sleep(0.05)
    print(json.dumps(job.id))
if verb == "outcome":
    out = Job.from_id(*rest).result()
    print(json.dumps([out.status, out.state_reason, out.output, out.stdout]))
"""

TRIAL = r"""
job() { u=$1; shift; as $u /opt/remoted/bin/python /trial/job.py "$@" 2>>/trial/log; }
begin() { job alice begin "$@" | tail -n 1 | tr -d '"'; }
python3 -m venv /v && /v/bin/pip install -q --disable-pip-version-check '/src[daemon]' >>/trial/log
mount -t tmpfs -o noexec,mode=755 tmpfs /opt; say noexec "$(/v/bin/remotectl install 2>&1; ls -d /opt/remoted* /etc/systemd/system/remoted* 2>/dev/null)"; umount /opt
mv /src /gone; say gone "$(/v/bin/remotectl install 2>&1)"; mv /gone /src
mkdir -p /etc/remoted; printf 'cpus = "all"\n' >/etc/remoted/config.toml; say unfit "$(/v/bin/remotectl install 2>&1; ls -d /opt/remoted* /etc/systemd/system/remoted* 2>/dev/null)"; rm /etc/remoted/config.toml
say nothing "$(/v/bin/remotectl uninstall --json 2>&1)"
say installed "$(/v/bin/remotectl install --json 2>&1)"
say active "$(systemctl is-active remoted.service remoted.socket | tr '\n' ' ')"
systemd-analyze verify /etc/systemd/system/remoted.service /etc/systemd/system/remoted.socket /etc/systemd/system/remoted-workers.slice >/trial/verify 2>&1; say verify "$? $(cat /trial/verify)"
mkdir -p /run/systemd/system/remoted.service.d; printf '[Service]\nWatchdogSec=6\n' >/run/systemd/system/remoted.service.d/soon.conf; systemctl daemon-reload; systemctl restart remoted
mkdir -p /etc/remoted/conf.d; printf '[limits]\nspeed = 1\n' >/etc/remoted/conf.d/bad.toml; systemctl reload remoted; say reload_bad "$? $(systemctl is-active remoted) $(journalctl -u remoted -o cat --no-pager | grep -c 'limits.speed: this limit')"
say doctor_bad "$(remotectl doctor --json 2>&1)"; say errors "$(journalctl -b -t remoted -p err -o cat --no-pager)"
rm /etc/remoted/conf.d/bad.toml; systemctl reload remoted; say reload_good "$? $(systemctl is-active remoted)"
say doctor "$(remotectl doctor --json 2>&1)"
say alice "$(job alice who)"; say bob "$(job bob who)"
say workers "$(as alice remotectl workers --json)"
say limits "$(systemctl show -p MemoryMax,TasksMax $(systemctl list-units --no-legend 'remoted-w*.scope' | grep -o 'remoted-w[^ ]*') | tr '\n' ' ')"
say hog "$(job alice hog)"; say doctor_limits "$(as alice remotectl doctor --json)"
chmod 600 /etc/remoted/config.toml; say doctor_closed "$(as alice remotectl doctor --json)"; chmod 644 /etc/remoted/config.toml
say scopes "$(systemctl list-units --no-legend 'remoted-*.scope' | grep -c running)"
systemctl stop remoted; say activated "$(job bob who)"
J=$(begin /home/alice/one); say warm "$(job bob warm)"; D=$(pid); systemctl restart remoted; as alice touch /home/alice/one; say restart "$(job alice outcome $J)"
say warm_restart "$(job bob warm)"; say daemons "$D $(pid) $(systemctl show -p NFileDescriptorStore --value remoted)"
J=$(begin /home/alice/two); kill -9 $(pid); as alice touch /home/alice/two; say kill "$(job alice outcome $J)"; say warm_kill "$(job bob warm)"
J=$(begin /home/alice/alone); systemctl stop remoted; say stopped "$(systemctl is-active remoted.service remoted.socket | tr '\n' ' ')"; as alice touch /home/alice/alone
while systemctl list-units --no-legend 'remoted-w*.scope' | grep -q running; do sleep 0.1; done; say stop "$(job alice outcome $J)"
J=$(begin /home/alice/over); systemctl stop remoted; systemctl start remoted; as alice touch /home/alice/over; say stop_start "$(job alice outcome $J)"
J=$(begin /home/alice/three); systemctl stop remoted-workers.slice; say slice "$(job alice outcome $J)"
J=$(begin /home/alice/four); B=$(systemctl show -p NRestarts --value remoted); kill -STOP $(pid)
while [ "$(systemctl show -p NRestarts --value remoted)" = "$B" ]; do sleep 0.2; done
as alice touch /home/alice/four; say watchdog "$(job alice outcome $J)"
journalctl -u remoted --no-pager >/trial/journal; say open "$(journalctl -b -t remoted -o cat --no-pager | tee /trial/own | grep -c 'open every GPU') $(grep -c . /trial/own)"
away() { say "away_$1" "$(as alice remotectl status 2>&1; echo "$?") $(as alice remotectl doctor 2>&1 | grep BAD) $(as alice /opt/remoted/bin/python /trial/job.py who 2>&1 | tail -n 1) $(ls -d /tmp/remoted-1* /home/alice/.local/state/remoted/lock)"; }
systemctl stop remoted.socket remoted; away stopped; systemctl restart remoted.socket remoted; say back_stopped "$(job alice who)"
chmod 700 /run/remoted; away closed; systemctl restart remoted.socket remoted; say back_closed "$(job alice who)"
rm -rf /run/remoted; away gone; systemctl restart remoted; say back_gone "$(job alice who)"
say warm_sockets "$(job bob warm)"; systemctl restart remoted.socket remoted; say back_sockets "$(job bob warm) $(systemctl is-active remoted.socket)"
mkdir /opt/remoted-interrup; touch /opt/remoted-interrup/pyvenv.cfg; J=$(begin /home/alice/last)
say unasked "$(/v/bin/remotectl uninstall 2>&1 </dev/null; echo "$?")"
say declined "$(echo n | /v/bin/python -c 'import pty; pty.spawn(["/v/bin/remotectl", "uninstall"])' | tr -d '\r')"; say after_no "$(systemctl is-active remoted) $(job bob who | wc -l)"
say swept "$(/v/bin/remotectl install --no-start --json 2>&1)"
say uninstalled "$(/v/bin/remotectl uninstall --yes --json 2>&1)"
say again "$(/v/bin/remotectl uninstall --json 2>&1)"
for _ in $(seq 100); do [ -z "$(systemctl list-units --no-legend 'remoted*')" ] && break; sleep 0.1; done
say left "$(ls -d /opt/remoted* /usr/local/bin/remotectl /etc/systemd/system/remoted* /run/remoted 2>/dev/null | tr '\n' ' ')$(systemctl list-units --no-legend 'remoted*')"
say own_again "$(as alice /v/bin/remotectl status 2>&1)"
"""


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def said(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """What the trial wrote down, by name."""
    with booted(request.param, TRIAL, JOB) as found:
        yield found


def _read(said: dict[str, str], name: str) -> Any:
    return json.loads(said[name])


def test_c01_install_puts_a_running_daemon_there(said: dict[str, str]) -> None:
    done = _read(said, "installed")["done"]

    assert any("/etc/remoted/config.toml" in step for step in done)
    assert said["active"].split() == ["active", "active"]


def test_c01_the_units_are_clean(said: dict[str, str]) -> None:
    assert said["verify"].strip() == "0"


def test_c04_a_reload_of_a_bad_configuration_fails_and_the_daemon_goes_on(said: dict[str, str]) -> None:
    code, state, named = said["reload_bad"].split()

    assert (code != "0", state, named != "0") == (True, "active", True)
    assert said["reload_good"].split() == ["0", "active"]


def test_c04_doctor_says_so_while_the_daemon_runs_and_errors_are_found_by_their_level(said: dict[str, str]) -> None:
    found = {check["name"]: check for check in _read(said, "doctor_bad")["checks"]}["configuration"]

    assert (found["ok"], "limits.speed: this limit does not exist" in found["detail"]) == (False, True)
    assert "limits.speed: this limit does not exist" in said["errors"]


@pytest.mark.parametrize(("why", "says"), [("noexec", "nothing in /opt may be executed"), ("gone", "/src, from which this remotectl was installed, is not there any more"), ("unfit", "it would not start: cannot use the configuration: /etc/remoted/config.toml: cpus: it must be a whole number")])
def test_c01_an_install_that_cannot_succeed_is_refused_before_anything_is_changed(said: dict[str, str], why: str, says: str) -> None:
    assert says in said[why]
    assert not [word for word in said[why].split() if word.startswith(("/opt/remoted", "/etc/systemd"))]


def test_c01_an_uninstall_of_nothing_says_so(said: dict[str, str]) -> None:
    assert _read(said, "nothing")["done"] == ["the system's daemon is not installed", "kept /etc/remoted, which an installation finds again; to remove them too: rm -r /etc/remoted"]
    assert _read(said, "again")["done"] == ["the system's daemon is not installed", "kept /etc/remoted and /var/lib/remoted, which an installation finds again; to remove them too: rm -r /etc/remoted /var/lib/remoted"]


def test_c01_the_security_score_is_no_worse_than_agreed() -> None:
    """7.7: docker, slurmd and nomad have 9.6; what would make it better would keep users' programs from working (decision 0022)."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=77", "--no-pager", str(UNITS / "remoted.service")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-300:]


def test_c01_doctor_finds_nothing_wrong_with_the_daemon(said: dict[str, str]) -> None:
    checks = {check["name"]: check for check in _read(said, "doctor")["checks"]}

    assert checks["state"]["ok"]
    assert checks["database"]["ok"]
    assert checks["interpreter"]["ok"]
    assert "/run/remoted/api.sock" in checks["socket path"]["detail"]


def test_c03_users_call_it_without_saying_where_it_is(said: dict[str, str]) -> None:
    (alice, directly), (bob, _) = _read(said, "alice"), _read(said, "bob")

    assert alice[0] == directly
    assert alice[0] != bob[0]
    assert alice[1] == [alice[0]]


def test_c01_each_worker_is_a_scope_below_the_slice(said: dict[str, str]) -> None:
    groups = _read(said, "alice")[0][2]

    assert "/remoted.slice/remoted-workers.slice/remoted-w" in groups
    assert "remoted.service" not in groups
    assert int(said["scopes"]) >= 2


def test_c01_a_forked_worker_gets_a_scope_with_its_limits(said: dict[str, str]) -> None:
    workers = _read(said, "workers")["workers"]

    assert {worker["start"] for worker in workers} == {"forked"}, workers
    assert f"MemoryMax={1 << 30}" in said["limits"]
    assert "TasksMax=8192" in said["limits"]


def test_t43_a_body_that_outgrows_its_memory_fails_in_a_container_too(said: dict[str, str]) -> None:
    """By its cgroup, or where that is not to be had by the rlimit that stands in."""
    status, reason, error = _read(said, "hog")

    assert status == "FAILED"
    assert reason == "OOM_RAM" or "MemoryError" in error, (reason, error)


def test_c07_without_a_card_nobody_is_warned_of_cards(said: dict[str, str]) -> None:
    warned, lines = map(int, said["open"].split())

    assert (warned, lines > 10) == (0, True)


def test_c01_doctor_says_limited_only_where_the_kernel_limits(said: dict[str, str]) -> None:
    """systemd shows a limit that it was asked for; in a container without the controllers of version 1 nothing comes of it."""
    groups = [line.split(":", 2) for line in _read(said, "alice")[0][2].split()]
    limited = any("memory" in names.split(",") and "/remoted-w" in path for _, names, path in groups) or all(not names for _, names, _ in groups)
    found = {check["name"]: check for check in _read(said, "doctor_limits")["checks"]}

    assert found["cgroups"]["ok"] == limited, (found["cgroups"], groups)
    assert found["configuration"]["ok"], "everybody may read the file of an installation"


def test_c04_a_configuration_that_a_user_may_not_read_is_no_illness(said: dict[str, str]) -> None:
    found = {check["name"]: check for check in _read(said, "doctor_closed")["checks"]}["configuration"]

    assert (found["ok"], found["detail"], found["advice"]) == (True, "/etc/remoted/config.toml is not yours to read", "`sudo remotectl doctor` looks at it")


def test_c01_a_call_starts_the_daemon_by_its_socket(said: dict[str, str]) -> None:
    assert _read(said, "activated")[0][0] == _read(said, "bob")[0][0]


@pytest.mark.parametrize("how", ["restart", "kill", "watchdog"])
def test_c09_a_running_job_outlives_the_daemon(said: dict[str, str], how: str) -> None:
    """Restarted by the administrator, killed, or hung until the watchdog bites (T58): the body goes on and its outcome comes home."""
    status, reason, output, stdout = _read(said, how)

    assert (status, reason) == ("COMPLETED", "")
    pid = output.removeprefix("done in ")
    assert stdout == f"begun in {pid}\nseen\n"


def test_c09_an_idle_worker_stays_warm_whatever_happens_to_the_daemon(said: dict[str, str]) -> None:
    """systemd keeps its descriptors: the same process before and after, with all that it had in memory."""
    before, after, at_last = (_read(said, name) for name in ("warm", "warm_restart", "warm_kill"))

    assert before[0] == after[0] == at_last[0]
    assert [before[1], after[1], at_last[1]] == [before[1], before[1] + 1, before[1] + 2]
    old, new, stored = said["daemons"].split()
    assert old != new
    assert int(stored) >= 10


@pytest.mark.parametrize("how", ["stop", "stop_start"])
def test_c09_a_running_job_outlives_a_stop_of_the_service(said: dict[str, str], how: str) -> None:
    """It ends while nothing runs but the job, and the next call finds its outcome; or it ends after the next start."""
    status, _, output, stdout = _read(said, how)

    assert said["stopped"].split() == ["inactive", "active"]
    assert status == "COMPLETED"
    assert stdout == f"begun in {output.removeprefix('done in ')}\nseen\n"


def test_c09_stopping_the_slice_ends_everything(said: dict[str, str]) -> None:
    status, reason, *_ = _read(said, "slice")

    assert (status, reason) == ("FAILED", "WORKER_DIED")


@pytest.mark.parametrize("how", ["stopped", "closed", "gone"])
def test_c01_who_finds_the_daemon_away_is_told_how_it_comes_back_and_starts_none(said: dict[str, str], how: str) -> None:
    reason = "you may not open it" if how == "closed" else "the system's daemon is installed here and does not run, or its sockets are gone"
    assert said[f"away_{how}"].count(reason) == 3, said[f"away_{how}"]  # status, doctor, a script
    assert said[f"away_{how}"].count("`systemctl restart remoted.socket remoted`") == 3
    assert " 3 BAD  daemon:" in said[f"away_{how}"]
    assert said[f"away_{how}"].rstrip().endswith("if you are to have one" if how != "closed" else "remoted`")
    assert _read(said, f"back_{how}")[1] == _read(said, "alice")[1]


def test_c01_sockets_are_restarted_under_warm_workers(said: dict[str, str]) -> None:
    before, after = _read(said, "warm_sockets"), said["back_sockets"]
    assert after == f"{json.dumps([before[0], before[1] + 1])} active "


def test_c01_after_an_uninstall_everybody_has_their_own_again(said: dict[str, str]) -> None:
    assert "it starts with your first call" in said["own_again"]


def test_c01_uninstall_asks_before_it_ends_running_jobs_and_a_script_has_to_say_yes(said: dict[str, str]) -> None:
    assert "cannot uninstall: 1 job of 1 user runs; `--yes` ends that" in said["unasked"]
    assert said["unasked"].split()[-1] == "1"
    assert "1 job of 1 user runs; end it? [y/N]:" in said["declined"]
    assert said["after_no"].split() == ["active", "1"]


def test_c01_the_next_install_takes_away_what_an_interrupted_one_left(said: dict[str, str]) -> None:
    assert any(step.startswith("removed /opt/remoted-interrup,") for step in _read(said, "swept")["done"])


def test_c01_uninstall_leaves_no_program_and_no_unit(said: dict[str, str]) -> None:
    assert said["left"].strip() == ""
    assert any("kept" in step for step in _read(said, "uninstalled")["done"])
