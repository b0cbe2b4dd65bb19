"""How fast the scheduler decides and how fair it is: ``python -m benchmarks.simulate --jobs 100000``."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator

from remoted.model import Uid
from remoted.scheduler import events
from remoted.scheduler.matching import parse_request
from remoted.scheduler.simulate import Arrival, Simulation
from remoted.scheduler.state import Need, PoolPolicy, Ticket


def poisson(jobs: int, users: int, gpus: int, load: float, seed: int) -> Iterator[Arrival]:
    """Calls of 4 s on average at ``load`` times what the GPUs can do; every 20th needs two GPUs, every 4th is a CPU call."""
    chance = random.Random(seed)
    mean, at = 4.0, 0.0
    for number in range(jobs):
        at += chance.expovariate(load * gpus / mean)
        wanted = 0 if number % 4 == 0 else 2 if number % 20 == 1 and gpus > 1 else 1
        uid = chance.randrange(users)
        yield Arrival(at, uid, chance.expovariate(1 / mean), wanted, f"{'cg'[bool(wanted)]}{wanted}", 0.0 if wanted else 1.0)


def decision_seconds(queued: int, samples: int = 200) -> list[float]:
    """How long one ``handle`` takes with so many calls of ten users in the queue."""
    simulation = Simulation(4)
    scheduler = simulation.scheduler
    for number in range(queued):
        uid = Uid(number % 10)
        need = Need(uid, (uid, "LiveServerless", "pool"), f"kind{number % 3}", parse_request((), 1 + (number % 7 == 0)))
        scheduler.handle(events.Submitted(Ticket(f"t{number}", need), PoolPolicy(workers_max=8)), 0.0)
    spent: list[float] = []
    for step in range(samples):
        event = next_event(simulation, step)
        began = time.perf_counter()
        scheduler.handle(event, float(step))
        spent.append(time.perf_counter() - began)
    return sorted(spent)


def pair_seconds(queued: int, samples: int = 2000) -> list[float]:
    """How long it takes that a call ends and the next of so many begins, in the only worker of the only pool."""
    simulation = Simulation(0)
    scheduler = simulation.scheduler
    need = Need(Uid(1), (1, "LiveServerless", "pool"), "kind")
    for number in range(queued):
        scheduler.handle(events.Submitted(Ticket(f"t{number}", need), PoolPolicy(workers_max=1)), 0.0)
    scheduler.handle(next_event(simulation, 0), 0.0)
    spent: list[float] = []
    for step in range(min(samples, queued - 1)):
        event = next_event(simulation, step)
        began = time.perf_counter()
        scheduler.handle(event, float(step))
        spent.append(time.perf_counter() - began)
    return sorted(spent)


def next_event(simulation: Simulation, step: int) -> events.Event:
    """Something that really happens next: a worker gets ready or dies, a call ends."""
    for worker in simulation.scheduler.workers.values():
        if worker.state.value == "STARTING":
            return events.WorkerReady(worker.id)
        if worker.state.value == "ENDING":
            return events.WorkerEnded(worker.id)
        if worker.running:
            return events.Ended(next(iter(worker.running)))
    return events.Tick()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--users", type=int, default=6)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    arrivals = list(poisson(options.jobs, options.users, options.gpus, options.load, options.seed))
    simulation = Simulation(options.gpus)
    began = time.perf_counter()
    report = simulation.run(arrivals)
    spent = time.perf_counter() - began
    print(f"{report.events} events in {spent:.2f} s: {report.events / spent:,.0f} events/s, {report.starts} workers started")
    print(f"waits: p50 {report.wait(0.5):.2f} s, p95 {report.wait(0.95):.2f} s, longest {report.wait(1.0):.2f} s; fairness {report.fairness():.4f}")
    print(f"quiet: {simulation.is_quiet}; virtual time {report.ended_at:.0f} s")
    times = decision_seconds(options.queued)
    print(f"one decision with {options.queued} queued: median {times[len(times) // 2] * 1e3:.3f} ms, worst {times[-1] * 1e3:.3f} ms")
    pairs = pair_seconds(options.queued)
    print(f"end and next start with {options.queued} queued for one worker: median {pairs[len(pairs) // 2] * 1e6:.1f} us, worst {pairs[-1] * 1e6:.1f} us")


if __name__ == "__main__":
    main()
