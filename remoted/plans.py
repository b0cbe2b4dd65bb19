"""How workers of each kind are started, as far as it is remembered: so much of each user, the newest.

A plan holds variables of its caller's, and a caller may make as many kinds as he likes. What is forgotten here his calls say
again: whoever waits for a worker still has what its plan was made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from remoted.cradle import WorkerPlan
from remoted.recent import Recents
from remoted.scheduler.state import KindId

#: Of one user.
_BYTES = 16 << 20
#: A plan without its texts.
_PLAN_BYTES = 2048
#: A text without its letters.
_TEXT_BYTES = 64


class Plans:
    """Plans by user and kind."""

    def __init__(self) -> None:
        self._kept: Recents[KindId, WorkerPlan] = Recents(_BYTES)

    def learn(self, uid: int, kind: KindId, plan: WorkerPlan) -> WorkerPlan:
        """The same kind always means the same plan, but for what is imported. Returns the one that counts from here on."""
        known = self._kept.get(uid, kind) or plan
        learnt = replace(known, hints=known.hints | plan.hints, import_environ=plan.import_environ)
        self._kept.add(uid, kind, learnt, _size(learnt))
        return learnt

    def find(self, uid: int, kind: KindId) -> WorkerPlan | None:
        """None: it is not remembered, or never was known."""
        return self._kept.get(uid, kind)


def _size(plan: WorkerPlan) -> int:
    """About what it takes up."""
    texts = [*plan.preload, *plan.hints, *(plan.environment.requirements if plan.environment else ())]
    return _PLAN_BYTES + sum(map(_of_variables, (plan.environ, plan.build_environ, plan.import_environ))) + sum(len(text) + _TEXT_BYTES for text in texts)


def _of_variables(environ: Mapping[str, str]) -> int:
    return sum(len(name) + len(value) + 2 * _TEXT_BYTES for name, value in environ.items())
