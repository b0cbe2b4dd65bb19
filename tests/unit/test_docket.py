"""Rows of one page: a lone job that is over is written once, and is then as any other (docs/decisions/0104)."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from remoted.docket import _ADD, _BEGIN, _FINISH, _ITEM, _Page
from remoted.usage import Span
from tests.unit.test_redo import Row, in_store, rows_of

#: Of each kind what differs from what a row has by itself.
ENDS = {
    "returned": ("COMPLETED", "", 1, "w1-1", "", 17.5, 18.5, 1.0, b"result", 6, "returned", 0, 0, "", "", ""),
    "raised": ("FAILED", "EXCEPTION", 3, "w1-1", "GPU-1 GPU-2", 17.5, 18.5, 1.0, None, 9, "raised", 4, 1, "it is broken", "builtins.ValueError", "Traceback ..."),
}


def page_of(job: Row | None = None, attempt: Row | None = None, *ends: Row, item: Row | None = None) -> _Page:
    page = _Page()
    for kind, row in ((_ADD, job), (_BEGIN, attempt), (_ITEM, item), *((_FINISH, end) for end in ends)):
        if row is not None:
            page.rows[kind].append(row)
            page.thens[kind].append((lambda about, error: None, None))
    page.spans += [Span(1000, 17.5, 18.5, 0, 1.0)] * len(ends)
    return page


def stored(folder: Path, *pages: _Page) -> tuple[list[set[int]], dict[str, list[tuple[Any, ...]]]]:
    """What each page says, and then all tables."""
    folder.mkdir(exist_ok=True)

    async def run(store: Any) -> list[set[int]]:
        return [await store.submit(page.run) for page in pages]

    said = in_store(folder, run)
    with sqlite3.connect(folder / "remoted.sqlite3") as db:
        tables = {table: sorted(db.execute(f"SELECT * FROM {table}").fetchall(), key=repr) for table in ("jobs", "attempts", "items", "usage")}
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    return said, tables


@pytest.mark.parametrize("kind", ENDS)
def test_a_job_that_is_over_when_it_is_stored_has_the_row_of_one_that_was_stored_before(tmp_path: Path, kind: str) -> None:
    job, attempt = rows_of(1)
    end, item = (1, *ENDS[kind]), (job[1], 0, 3, b"one")
    said, at_once = stored(tmp_path / "once", page_of(job, attempt, end, item=item))
    _, apart = stored(tmp_path / "apart", page_of(job, attempt, item=item), page_of(None, None, end))

    assert said == [set()]
    assert len(at_once["jobs"]) == len(at_once["attempts"]) == len(at_once["items"]) == len(at_once["usage"]) == 1
    assert at_once == apart


def test_other_jobs_that_end_on_its_page_end_too(tmp_path: Path) -> None:
    (first, first_attempt), (second, second_attempt) = rows_of(1), rows_of(2)
    ends = [(2, *ENDS["raised"]), (1, *ENDS["returned"])]
    said, at_once = stored(tmp_path / "once", page_of(first, first_attempt), page_of(second, second_attempt, *ends))
    _, apart = stored(tmp_path / "apart", page_of(first, first_attempt), page_of(second, second_attempt), page_of(None, None, *ends))

    assert said == [set(), set()]
    assert at_once == apart


def test_the_end_of_a_job_that_is_stored_already_is_stored(tmp_path: Path) -> None:
    job, attempt = rows_of(1)
    end = (1, *ENDS["returned"])
    _, found = stored(tmp_path / "again", page_of(job, attempt), page_of(job, None, end))
    _, apart = stored(tmp_path / "apart", page_of(job, attempt), page_of(None, None, end))

    assert found == apart


def test_t61_a_job_that_was_known_stays_as_it_is_and_nothing_of_its_double_is_stored(tmp_path: Path) -> None:
    """Not its attempt, its end, its items, nor what it used: that is charged apart."""
    job, attempt = rows_of(1)
    double, its_attempt = (2, *job[1:]), rows_of(2)[1]
    page = page_of(double, its_attempt, (2, *ENDS["raised"]), item=(job[1], 0, 3, b"one"))
    said, found = stored(tmp_path / "double", page_of(job, attempt, (1, *ENDS["returned"])), page)
    _, alone = stored(tmp_path / "alone", page_of(job, attempt, (1, *ENDS["returned"])))

    assert said == [set(), {0}]
    assert found == alone
