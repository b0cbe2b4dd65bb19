-- Every statement has a name and one sentence. No SQL stands anywhere else.

-- name: schema
-- The tables; run once on an empty database. A job's row is written when it comes and when it ends: what runs is told by an
-- attempt without an end, and the last attempt ends with its job.
CREATE TABLE contents (
    uid INTEGER NOT NULL, digest TEXT NOT NULL, role TEXT NOT NULL CHECK (role IN ('spec', 'code', 'modules', 'arguments', 'constructor')),
    size INTEGER NOT NULL, inline BLOB, used_at REAL NOT NULL,
    PRIMARY KEY (uid, digest)
) STRICT, WITHOUT ROWID;
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, uid INTEGER NOT NULL,
    name TEXT NOT NULL, function TEXT NOT NULL, pool TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('IN_QUEUE', 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT')),
    state_reason TEXT NOT NULL DEFAULT '',
    spec TEXT NOT NULL, code TEXT NOT NULL, modules TEXT NOT NULL, context TEXT NOT NULL,
    arguments TEXT NOT NULL, arguments_inline BLOB, options TEXT NOT NULL,
    parent TEXT NOT NULL DEFAULT '', caller TEXT NOT NULL DEFAULT '',
    attempts INTEGER NOT NULL DEFAULT 0,
    submitted_at REAL NOT NULL, started_at REAL, ended_at REAL, run_seconds REAL NOT NULL DEFAULT 0,
    worker TEXT NOT NULL DEFAULT '', gpus TEXT NOT NULL DEFAULT '',
    result_inline BLOB, result_size INTEGER NOT NULL DEFAULT 0, result_kind TEXT NOT NULL DEFAULT '',
    items INTEGER NOT NULL DEFAULT 0, reconstructed INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '', error_type TEXT NOT NULL DEFAULT '', traceback TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX jobs_by_age ON jobs (uid, submitted_at);
CREATE INDEX jobs_live ON jobs (uid) WHERE ended_at IS NULL;
CREATE TABLE attempts (
    job INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE, number INTEGER NOT NULL, token TEXT NOT NULL,
    worker TEXT NOT NULL, worker_pid INTEGER NOT NULL, worker_started REAL NOT NULL, boot_id TEXT NOT NULL, devices TEXT NOT NULL,
    position INTEGER NOT NULL, started_at REAL NOT NULL, ended_at REAL, outcome TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE items (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, number INTEGER NOT NULL, size INTEGER NOT NULL, inline BLOB,
    PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE usage (
    uid INTEGER NOT NULL, hour INTEGER NOT NULL, gpu_seconds REAL NOT NULL, cpu_seconds REAL NOT NULL,
    PRIMARY KEY (uid, hour)
) STRICT, WITHOUT ROWID;

-- name: migrate_1
-- From schema 1: which of the calls that a worker was given an attempt was.
ALTER TABLE attempts ADD COLUMN position INTEGER NOT NULL DEFAULT 0;

-- name: migrate_2
-- From schema 2: who used how much in which hour.
CREATE TABLE usage (
    uid INTEGER NOT NULL, hour INTEGER NOT NULL, gpu_seconds REAL NOT NULL, cpu_seconds REAL NOT NULL,
    PRIMARY KEY (uid, hour)
) STRICT, WITHOUT ROWID;

-- name: migrate_3
-- From schema 3: fewer indices and fewer writes for each job (docs/decisions/0031). The id of a job tells its key.
PRAGMA foreign_keys = OFF;
BEGIN;
ALTER TABLE jobs RENAME TO jobs_3;
ALTER TABLE attempts RENAME TO attempts_3;
ALTER TABLE items RENAME TO items_3;
DROP INDEX jobs_by_age;
DROP INDEX jobs_live;
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, uid INTEGER NOT NULL,
    name TEXT NOT NULL, function TEXT NOT NULL, pool TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('IN_QUEUE', 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT')),
    state_reason TEXT NOT NULL DEFAULT '',
    spec TEXT NOT NULL, code TEXT NOT NULL, modules TEXT NOT NULL, context TEXT NOT NULL,
    arguments TEXT NOT NULL, arguments_inline BLOB, options TEXT NOT NULL,
    parent TEXT NOT NULL DEFAULT '', caller TEXT NOT NULL DEFAULT '',
    attempts INTEGER NOT NULL DEFAULT 0,
    submitted_at REAL NOT NULL, started_at REAL, ended_at REAL, run_seconds REAL NOT NULL DEFAULT 0,
    worker TEXT NOT NULL DEFAULT '', gpus TEXT NOT NULL DEFAULT '',
    result_inline BLOB, result_size INTEGER NOT NULL DEFAULT 0, result_kind TEXT NOT NULL DEFAULT '',
    items INTEGER NOT NULL DEFAULT 0, reconstructed INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '', error_type TEXT NOT NULL DEFAULT '', traceback TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX jobs_by_age ON jobs (uid, submitted_at);
CREATE INDEX jobs_live ON jobs (uid) WHERE ended_at IS NULL;
CREATE TABLE attempts (
    job INTEGER NOT NULL REFERENCES jobs (seq) ON DELETE CASCADE, number INTEGER NOT NULL, token TEXT NOT NULL,
    worker TEXT NOT NULL, worker_pid INTEGER NOT NULL, worker_started REAL NOT NULL, boot_id TEXT NOT NULL, devices TEXT NOT NULL,
    position INTEGER NOT NULL, started_at REAL NOT NULL, ended_at REAL, outcome TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE items (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, number INTEGER NOT NULL, size INTEGER NOT NULL, inline BLOB,
    PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;
INSERT INTO jobs (seq, id, uid, name, function, pool, status, state_reason, spec, code, modules, context, arguments, arguments_inline, options,
    parent, caller, attempts, submitted_at, started_at, ended_at, run_seconds, worker, gpus, result_inline, result_size, result_kind,
    items, reconstructed, error, error_type, traceback)
SELECT rowid, id, uid, name, function, pool, replace(status, 'IN_PROGRESS', 'IN_QUEUE'), state_reason, spec, code, modules, context, arguments, arguments_inline, options,
    parent, caller, attempts - (SELECT count(*) FROM attempts_3 WHERE job = jobs_3.id AND attempts_3.ended_at IS NULL AND jobs_3.ended_at IS NULL),
    submitted_at, started_at, ended_at, run_seconds, worker, gpus, result_inline, result_size, result_kind,
    items, reconstructed, error, error_type, traceback FROM jobs_3;
INSERT INTO attempts (job, number, token, worker, worker_pid, worker_started, boot_id, devices, position, started_at, ended_at, outcome, message)
SELECT jobs_3.rowid, number, token, attempts_3.worker, worker_pid, worker_started, boot_id, devices, position, attempts_3.started_at, attempts_3.ended_at, outcome, message
FROM attempts_3 JOIN jobs_3 ON jobs_3.id = attempts_3.job;
INSERT INTO items SELECT * FROM items_3;
DROP TABLE items_3;
DROP TABLE attempts_3;
DROP TABLE jobs_3;
PRAGMA user_version = 4;
COMMIT;
PRAGMA foreign_keys = ON;

-- name: add_usage
-- What one user held in one hour, in seconds of GPUs and CPUs.
INSERT INTO usage (uid, hour, gpu_seconds, cpu_seconds) VALUES (:uid, :hour, :gpu_seconds, :cpu_seconds)
ON CONFLICT (uid, hour) DO UPDATE SET gpu_seconds = gpu_seconds + :gpu_seconds, cpu_seconds = cpu_seconds + :cpu_seconds;

-- name: get_usage
-- What each user held since an hour.
SELECT uid, sum(gpu_seconds) AS gpu_seconds, sum(cpu_seconds) AS cpu_seconds FROM usage WHERE hour >= :since GROUP BY uid;

-- name: delete_usage
-- Forget hours of long ago.
DELETE FROM usage WHERE hour < :before;

-- name: kept_bytes
-- What jobs, their results and items, and content of each user take. A job's row is :row beside what it holds.
SELECT uid, sum(bytes) AS bytes FROM (
    SELECT uid, result_size + :row + coalesce(length(arguments_inline), 0) + length(error) + length(traceback) AS bytes FROM jobs
    UNION ALL SELECT uid, items.size AS bytes FROM items JOIN jobs ON jobs.id = items.job
    UNION ALL SELECT uid, size AS bytes FROM contents
) GROUP BY uid;

-- name: add_content
-- Remember content; the same content again only refreshes its age.
INSERT INTO contents (uid, digest, role, size, inline, used_at) VALUES (:uid, :digest, :role, :size, :inline, :now)
ON CONFLICT (uid, digest) DO UPDATE SET used_at = :now;

-- name: get_content
-- One user's content by its digest.
SELECT digest, role, size, inline FROM contents WHERE uid = :uid AND digest = :digest;

-- name: stale_contents
-- Content that no live job refers to and nobody has used since a moment.
SELECT uid, digest, inline IS NULL AS is_file FROM contents
WHERE used_at < :before AND (:uid IS NULL OR uid = :uid) AND NOT EXISTS (
    SELECT 1 FROM jobs WHERE jobs.uid = contents.uid AND jobs.ended_at IS NULL
    AND contents.digest IN (jobs.spec, jobs.code, jobs.modules, jobs.arguments));

-- name: delete_content
-- Forget content.
DELETE FROM contents WHERE uid = :uid AND digest = :digest;

-- name: add_jobs
-- New jobs, acknowledged only after this is committed; those whose id is known are left out.
INSERT INTO jobs (seq, id, uid, name, function, pool, status, spec, code, modules, context, arguments, arguments_inline, options, parent, caller, submitted_at)
VALUES :rows ON CONFLICT (id) DO NOTHING;

-- name: add_ended_jobs
-- The same of jobs that are over already: each is one row from the start, and in no index of what is not over.
INSERT INTO jobs (seq, id, uid, name, function, pool, status, spec, code, modules, context, arguments, arguments_inline, options, parent, caller, submitted_at,
    state_reason, attempts, worker, gpus, started_at, ended_at, run_seconds, result_inline, result_size, result_kind, items, reconstructed, error, error_type, traceback)
VALUES :rows ON CONFLICT (id) DO NOTHING;

-- name: last_seq
-- The newest job's number.
SELECT coalesce(max(seq), 0) AS seq FROM jobs;

-- name: seq_of
-- The number under which a job is stored (T61: a lost acknowledgement).
SELECT seq FROM jobs WHERE id = :id;

-- name: has_job
-- Is there a job of this number?
SELECT 1 FROM jobs WHERE seq = :seq;

-- name: begin_attempts
-- The attempts exist before their payloads leave for a worker.
INSERT INTO attempts (job, number, token, worker, worker_pid, worker_started, boot_id, devices, position, started_at) VALUES :rows;

-- name: end_attempt
-- How an attempt ended that another one will follow; a second word about it changes nothing.
UPDATE attempts SET ended_at = :now, outcome = :outcome, message = :message WHERE job = :job AND number = :number AND ended_at IS NULL;

-- name: drop_attempt
-- The worker had been given it ahead and never began it: it was none.
DELETE FROM attempts WHERE job = :job AND number = :number AND ended_at IS NULL;

-- name: requeue_job
-- Another attempt will follow.
UPDATE jobs SET state_reason = :state_reason, run_seconds = :run_seconds, attempts = :attempts, worker = :worker, gpus = :gpus,
    started_at = :started_at, error = :error, error_type = :error_type, traceback = :traceback
WHERE seq = :job AND ended_at IS NULL;

-- name: finish_jobs
-- The one terminal status; terminal states never change.
UPDATE jobs SET status = ends.column2, state_reason = ends.column3, attempts = ends.column4, worker = ends.column5, gpus = ends.column6,
    started_at = ends.column7, ended_at = ends.column8, run_seconds = ends.column9, result_inline = ends.column10, result_size = ends.column11,
    result_kind = ends.column12, items = ends.column13, reconstructed = ends.column14, error = ends.column15, error_type = ends.column16,
    traceback = ends.column17
FROM (VALUES :rows) AS ends WHERE seq = ends.column1 AND ended_at IS NULL;

-- name: add_items
-- Items of streams; a worker may repeat one to the next daemon.
INSERT INTO items (job, number, size, inline) VALUES :rows ON CONFLICT (job, number) DO NOTHING;

-- name: get_items
-- The items of a stream, in order.
SELECT number, size, inline FROM items WHERE job = :job ORDER BY number;

-- name: live_jobs
-- Everything that is not over, oldest first: the queue after a restart.
SELECT jobs.*, '' AS submission_key, jobs.attempts + count(attempts.number) - count(attempts.ended_at) AS all_attempts, coalesce(max(attempts.number), 0) AS tries,
    coalesce(jobs.started_at, min(attempts.started_at)) AS first_started_at
FROM jobs LEFT JOIN attempts ON attempts.job = jobs.seq WHERE jobs.ended_at IS NULL GROUP BY jobs.seq ORDER BY jobs.seq;

-- name: live_attempts
-- Attempts that had begun when the last daemon ended.
SELECT jobs.id AS job, number, token, attempts.worker, worker_pid, worker_started, boot_id, devices, position, attempts.started_at FROM jobs JOIN attempts ON attempts.job = jobs.seq WHERE jobs.ended_at IS NULL AND attempts.ended_at IS NULL;

-- name: get_job
-- One job of one user; another's is not found (T10).
SELECT * FROM jobs WHERE id = :id AND uid = :uid;

-- name: get_attempts
-- Every try of a job.
SELECT number, attempts.worker, worker_pid, devices, attempts.started_at, coalesce(attempts.ended_at, jobs.ended_at) AS ended_at,
    iif(attempts.ended_at IS NULL, result_kind, outcome) AS outcome, iif(attempts.ended_at IS NULL, error, message) AS message
FROM attempts JOIN jobs ON jobs.seq = attempts.job WHERE jobs.id = :job ORDER BY number;

-- name: find_jobs
-- One user's jobs whose id begins with something, newest first.
SELECT id FROM jobs WHERE uid = :uid AND id GLOB :pattern ORDER BY submitted_at DESC LIMIT 3;

-- name: list_jobs
-- One user's jobs, newest first, from behind the job :after on; "" means any.
SELECT * FROM jobs WHERE uid = :uid AND (:all OR ended_at IS NULL)
AND (:status = '' OR instr(',' || :status || ',', ',' || iif(ended_at IS NULL AND EXISTS (SELECT 1 FROM attempts WHERE job = seq AND attempts.ended_at IS NULL), 'IN_PROGRESS', status) || ','))
AND (:pool = '' OR pool = :pool) AND (:name = '' OR name GLOB :name)
AND (:after = '' OR (submitted_at, seq) < (SELECT submitted_at, seq FROM jobs AS seen WHERE seen.id = :after AND seen.uid = :uid))
ORDER BY submitted_at DESC, seq DESC LIMIT :limit;

-- name: expired_jobs
-- Jobs that ended long ago.
SELECT id, uid FROM jobs WHERE ended_at < :before;

-- name: oldest_results
-- What one user's finished jobs keep, oldest first, for the quota.
SELECT id, result_size + (SELECT coalesce(sum(size), 0) FROM items WHERE job = id) AS bytes FROM jobs WHERE uid = :uid AND ended_at IS NOT NULL ORDER BY ended_at;

-- name: delete_job
-- Forget a job, its attempts and items.
DELETE FROM jobs WHERE id = :id;
