"""Databases as earlier versions of the daemon wrote them, made of one of today."""

from __future__ import annotations

import sqlite3
from pathlib import Path

_FIRST = """
PRAGMA foreign_keys = OFF;
PRAGMA legacy_alter_table = ON;
ALTER TABLE jobs RENAME TO jobs_now;
ALTER TABLE attempts RENAME TO attempts_now;
ALTER TABLE items RENAME TO items_now;
DROP INDEX jobs_by_age;
DROP INDEX jobs_live;
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, uid INTEGER NOT NULL, submission_key TEXT NOT NULL,
    name TEXT NOT NULL, function TEXT NOT NULL, pool TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('IN_QUEUE', 'IN_PROGRESS', 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT')),
    state_reason TEXT NOT NULL DEFAULT '',
    spec TEXT NOT NULL, code TEXT NOT NULL, modules TEXT NOT NULL, context TEXT NOT NULL,
    arguments TEXT NOT NULL, arguments_inline BLOB, options TEXT NOT NULL,
    parent TEXT NOT NULL DEFAULT '', caller TEXT NOT NULL DEFAULT '',
    attempts INTEGER NOT NULL DEFAULT 0,
    submitted_at REAL NOT NULL, started_at REAL, ended_at REAL, run_seconds REAL NOT NULL DEFAULT 0,
    worker TEXT NOT NULL DEFAULT '', gpus TEXT NOT NULL DEFAULT '',
    result_inline BLOB, result_size INTEGER NOT NULL DEFAULT 0, result_kind TEXT NOT NULL DEFAULT '',
    items INTEGER NOT NULL DEFAULT 0, reconstructed INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '', error_type TEXT NOT NULL DEFAULT '', traceback TEXT NOT NULL DEFAULT '',
    UNIQUE (uid, submission_key)
) STRICT;
CREATE INDEX jobs_by_age ON jobs (uid, submitted_at);
CREATE INDEX jobs_live ON jobs (status) WHERE status IN ('IN_QUEUE', 'IN_PROGRESS');
CREATE TABLE attempts (
    token TEXT PRIMARY KEY, job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, number INTEGER NOT NULL,
    worker TEXT NOT NULL, worker_pid INTEGER NOT NULL, worker_started REAL NOT NULL, boot_id TEXT NOT NULL, devices TEXT NOT NULL,
    started_at REAL NOT NULL, ended_at REAL, outcome TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '',
    UNIQUE (job, number)
) STRICT;
CREATE UNIQUE INDEX one_live_attempt ON attempts (job) WHERE ended_at IS NULL;
CREATE TABLE items (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, number INTEGER NOT NULL, size INTEGER NOT NULL, inline BLOB,
    PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;
INSERT INTO jobs (rowid, submission_key, id, uid, name, function, pool, status, state_reason, spec, code, modules, context, arguments, arguments_inline, options, parent, caller, attempts, submitted_at, started_at, ended_at, run_seconds, worker, gpus, result_inline, result_size, result_kind, items, reconstructed, error, error_type, traceback)
SELECT seq, 'key-' || id, id, uid, name, function, pool, status, state_reason, spec, code, modules, context, arguments, arguments_inline, options, parent, caller, attempts, submitted_at, started_at, ended_at, run_seconds, worker, gpus, result_inline, result_size, result_kind, items, reconstructed, error, error_type, traceback FROM jobs_now;
INSERT INTO attempts (token, job, number, worker, worker_pid, worker_started, boot_id, devices, started_at, ended_at, outcome, message)
SELECT token, id, number, attempts_now.worker, worker_pid, worker_started, boot_id, devices, attempts_now.started_at, jobs_now.ended_at, result_kind, ''
FROM attempts_now JOIN jobs_now ON seq = job;
INSERT INTO items SELECT * FROM items_now;
DROP TABLE items_now;
DROP TABLE attempts_now;
DROP TABLE jobs_now;
DROP TABLE usage;
"""
_LATER = """
ALTER TABLE attempts ADD COLUMN position INTEGER NOT NULL DEFAULT 0;
"""


def make_old(path: Path, version: int) -> None:
    """Schema 1, or 2. Of live jobs the attempt that runs is marked as it was then."""
    with sqlite3.connect(path) as db:
        db.executescript(_FIRST + (_LATER if version > 1 else ""))
        db.execute(
            "UPDATE jobs SET status = 'IN_PROGRESS', attempts = attempts + 1 WHERE ended_at IS NULL AND EXISTS (SELECT 1 FROM attempts WHERE job = id AND attempts.ended_at IS NULL)"
        )
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
