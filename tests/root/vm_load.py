"""What clients in a computer were told while it was mistreated, and what came of it: lost, twice, wrong.

Every body leaves its attempt's token in a file of its user, synced before it goes on. What a client is told is noted here,
outside of the computer, so that no cut of power takes it back.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field

from tests.root.vm import Machine

SCRIPT = """
import os, sys
from remoted_client import *
from remoted_client import context, remote
queue = CpuLiveServerless(name="load", workersMax=2)
@remote(queue)
def body(n):
    call = context.running_call()
    fd = os.open(os.path.expanduser("~/tokens"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{call.attempt} {call.id}\\n".encode())
    os.fsync(fd)
    os.close(fd)
    return n * n
def outcome(job):
    tell(job, Job.from_id(job).result())
def tell(job, out):
    print("outcome", job, out.status.value, out.state_reason or "-", out.output, flush=True)
if sys.argv[1] == "submit":
    for n in range(int(sys.argv[2])):
        is_waited_for = n % 4 == 0  # such a one may begin before it is stored
        job = body.options(detach=not is_waited_for, max_retries=int(n % 8 > 3))(n)
        out = job.result() if is_waited_for else None
        print("acknowledged", job.id, n, int(n % 8 > 3), flush=True)
        if is_waited_for: tell(job.id, out)
        elif n % 4 == 3: outcome(job.id)
else:
    with open(sys.argv[2]) if len(sys.argv) > 2 else sys.stdin as file: asked = file.read().split()
    for job in asked:
        try: outcome(job)
        except SubmissionRefused as error: print("outcome", job, error.code, "-", None)
    print("end", flush=True)
"""
_ACKNOWLEDGED = re.compile(r"acknowledged ([0-9a-f]{32}) (\d+) (\d)")
_OUTCOME = re.compile(r"outcome ([0-9a-f]{32}) (\S+) (\S+) (\S+)")
_TOKEN = re.compile(r"(\S+) ([0-9a-f]{32})")


@dataclass
class Verdict:
    """Of one mistreatment; the columns of docs/reliability.md."""

    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.twice or self.wrong)

    def __str__(self) -> str:
        return f"{self.acknowledged} acknowledged, {len(self.lost)} lost, {len(self.twice)} twice, {len(self.wrong)} wrong: {dict(self.statuses)} {self.lost[:3]} {self.twice[:3]} {self.wrong[:3]}"


class Load:
    """Users who submit, all at once."""

    def __init__(self, machine: Machine, users: tuple[int, ...], jobs: int) -> None:
        self._machine = machine
        self._clients = {uid: machine.script("load", "submit", str(jobs), uid=uid) for uid in users}
        self._jobs = jobs

    def acknowledged(self) -> int:
        """How many until now."""
        return sum(line.startswith("acknowledged") for client in self._clients.values() for line in client.lines)

    def wait_for(self, share: float) -> None:
        """Until so much of it is acknowledged."""
        goal = int(share * self._jobs * len(self._clients))
        self._machine.wait(lambda: self.acknowledged() >= goal or any(client.code for client in self._clients.values()), f"only {self.acknowledged()} of {goal} jobs are acknowledged")

    def finish(self) -> None:
        """Until all of it is."""
        for client in self._clients.values():
            done = self._machine.end(client)
            assert done.code == 0, done.out

    def judge(self) -> Verdict:
        """Ask for every job that was acknowledged, wait until it has ended, and compare."""
        asked = {uid: self._machine.script("load", "check", uid=uid, text=" ".join(told(client.lines)[0])) for uid, client in self._clients.items()}
        verdict = Verdict()
        for uid, client in self._clients.items():
            found = self._machine.end(asked[uid])
            assert found.out.endswith("end"), found.out
            tokens = self._machine.run("cat ~/tokens 2>/dev/null", uid, check=False).out
            compare(verdict, *told(client.lines), told(asked[uid].lines)[1], tokens)
        report(verdict)
        return verdict


def report(verdict: object) -> None:
    """For docs/reliability.md, where REMOTED_TEST_REPORT says."""
    if path := os.environ.get("REMOTED_TEST_REPORT"):
        with open(path, "a", encoding="utf-8") as file:
            print(os.environ.get("PYTEST_CURRENT_TEST"), verdict, file=file)


def told(lines: list[str]) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[str, str, str]]]:
    """(job: argument and retries) and (job: status, reason, output), as far as it was told whole."""
    jobs, outcomes = {}, {}
    for line in lines:
        if match := _ACKNOWLEDGED.fullmatch(line):
            jobs[match[1]] = (int(match[2]), int(match[3]))
        elif match := _OUTCOME.fullmatch(line):
            outcomes[match[1]] = (match[2], match[3], match[4])
    return jobs, outcomes


def compare(verdict: Verdict, jobs: dict[str, tuple[int, int]], outcomes: dict[str, tuple[str, str, str]], found: dict[str, tuple[str, str, str]], text: str) -> None:
    """``jobs`` and ``outcomes`` as their client was told, ``found`` as it is now, and the tokens that bodies have left."""
    tokens = _TOKEN.findall(text)
    runs = Counter(job for _, job in tokens)
    verdict.acknowledged += len(jobs)
    verdict.twice += [token for token, count in Counter(token for token, _ in tokens).items() if count > 1]
    verdict.twice += [job for job, (_, retries) in jobs.items() if runs[job] > 1 + retries]
    for job, (n, retries) in jobs.items():
        status, reason, output = found.get(job, ("UNKNOWN", "-", ""))
        verdict.statuses[f"{status} {reason}"] += 1
        if status not in ("COMPLETED", "FAILED"):
            verdict.lost.append(job)
        elif outcomes.get(job, (status, reason, output)) != (status, reason, output):
            verdict.wrong.append(f"{job}: {outcomes[job]} became {found[job]}")
        elif status == "COMPLETED" and (output != str(n * n) or not runs[job]):
            verdict.wrong.append(f"{job}: {output} of {n} after {runs[job]} runs")
        elif status == "FAILED" and (reason != "LOST" or retries):
            verdict.wrong.append(f"{job}: {reason} with {retries} retries")
