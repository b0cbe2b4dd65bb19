-- Every statement has a name and one sentence. No SQL stands anywhere else.

-- name: schema
-- The tables; run once on an empty database.
CREATE TABLE contents (
    uid INTEGER NOT NULL, digest TEXT NOT NULL, role TEXT NOT NULL CHECK (role IN ('spec', 'code', 'modules', 'arguments', 'constructor')),
    size INTEGER NOT NULL, inline BLOB, used_at REAL NOT NULL,
    PRIMARY KEY (uid, digest)
) STRICT, WITHOUT ROWID;
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
    position INTEGER NOT NULL DEFAULT 0,
    started_at REAL NOT NULL, ended_at REAL, outcome TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '',
    UNIQUE (job, number)
) STRICT;
CREATE UNIQUE INDEX one_live_attempt ON attempts (job) WHERE ended_at IS NULL;
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
-- What results and content of each user take (or of one).
SELECT uid, sum(bytes) AS bytes FROM (
    SELECT uid, result_size AS bytes FROM jobs WHERE ended_at IS NOT NULL AND (:uid IS NULL OR uid = :uid)
    UNION ALL SELECT uid, size AS bytes FROM contents WHERE (:uid IS NULL OR uid = :uid)
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
WHERE used_at < :before AND NOT EXISTS (
    SELECT 1 FROM jobs WHERE jobs.uid = contents.uid AND jobs.status IN ('IN_QUEUE', 'IN_PROGRESS')
    AND contents.digest IN (jobs.spec, jobs.code, jobs.modules, jobs.arguments));

-- name: delete_content
-- Forget content.
DELETE FROM contents WHERE uid = :uid AND digest = :digest;

-- name: add_job
-- A new job, acknowledged only after this is committed; nothing if its key is known.
INSERT INTO jobs (id, uid, submission_key, name, function, pool, status, spec, code, modules, context, arguments, arguments_inline, options, parent, caller, submitted_at)
VALUES (:id, :uid, :submission_key, :name, :function, :pool, 'IN_QUEUE', :spec, :code, :modules, :context, :arguments, :arguments_inline, :options, :parent, :caller, :submitted_at)
ON CONFLICT (uid, submission_key) DO NOTHING;

-- name: job_by_key
-- The job that an earlier submission with this key made (T61: a lost acknowledgement).
SELECT id FROM jobs WHERE uid = :uid AND submission_key = :submission_key;

-- name: begin_attempt
-- The attempt exists before its payload leaves for the worker.
INSERT INTO attempts (token, job, number, worker, worker_pid, worker_started, boot_id, devices, position, started_at)
VALUES (:token, :job, :number, :worker, :worker_pid, :worker_started, :boot_id, :devices, :position, :now);

-- name: mark_running
-- The job of an attempt that begins.
UPDATE jobs SET status = 'IN_PROGRESS', state_reason = '', attempts = :attempts, worker = :worker, gpus = :devices,
    started_at = coalesce(started_at, :now)
WHERE id = :job AND status IN ('IN_QUEUE', 'IN_PROGRESS');

-- name: end_attempt
-- How the attempt ended; a second word about it changes nothing.
UPDATE attempts SET ended_at = :now, outcome = :outcome, message = :message WHERE token = :token AND ended_at IS NULL;

-- name: drop_attempt
-- The worker had been given it ahead and never began it: it was none.
DELETE FROM attempts WHERE token = :token AND ended_at IS NULL;

-- name: return_job
-- The job of such an attempt waits again.
UPDATE jobs SET status = 'IN_QUEUE', state_reason = '', attempts = :attempts WHERE id = :job AND status IN ('IN_QUEUE', 'IN_PROGRESS');

-- name: requeue_job
-- Another attempt will follow.
UPDATE jobs SET status = 'IN_QUEUE', state_reason = :state_reason, run_seconds = run_seconds + :run_seconds,
    error = :error, error_type = :error_type, traceback = :traceback
WHERE id = :job AND status IN ('IN_QUEUE', 'IN_PROGRESS');

-- name: finish_job
-- The one terminal status; terminal states never change.
UPDATE jobs SET status = :status, state_reason = :state_reason, ended_at = :now, run_seconds = run_seconds + :run_seconds,
    result_inline = :result_inline, result_size = :result_size, result_kind = :result_kind, items = :items, reconstructed = :reconstructed,
    error = :error, error_type = :error_type, traceback = :traceback
WHERE id = :job AND status IN ('IN_QUEUE', 'IN_PROGRESS');

-- name: add_item
-- One item of a stream; a worker may repeat it to the next daemon.
INSERT INTO items (job, number, size, inline) VALUES (:job, :number, :size, :inline) ON CONFLICT (job, number) DO NOTHING;

-- name: get_items
-- The items of a stream, in order.
SELECT number, size, inline FROM items WHERE job = :job ORDER BY number;

-- name: live_jobs
-- Everything that is not over, oldest first: the queue after a restart.
SELECT *, (SELECT coalesce(max(number), 0) FROM attempts WHERE job = jobs.id) AS tries
FROM jobs WHERE status IN ('IN_QUEUE', 'IN_PROGRESS') ORDER BY submitted_at, rowid;

-- name: live_attempts
-- Attempts that had begun when the last daemon ended.
SELECT * FROM attempts WHERE ended_at IS NULL;

-- name: get_job
-- One job of one user; another's is not found (T10).
SELECT * FROM jobs WHERE id = :id AND uid = :uid;

-- name: get_attempts
-- Every try of a job.
SELECT * FROM attempts WHERE job = :job ORDER BY number;

-- name: find_jobs
-- One user's jobs whose id begins with something, newest first.
SELECT id FROM jobs WHERE uid = :uid AND id GLOB :pattern ORDER BY submitted_at DESC LIMIT 3;

-- name: list_jobs
-- One user's jobs, newest first, from behind the job :after on; "" means any.
SELECT * FROM jobs WHERE uid = :uid AND (:all OR status IN ('IN_QUEUE', 'IN_PROGRESS'))
AND (:status = '' OR instr(',' || :status || ',', ',' || status || ',')) AND (:pool = '' OR pool = :pool) AND (:name = '' OR name GLOB :name)
AND (:after = '' OR (submitted_at, rowid) < (SELECT submitted_at, rowid FROM jobs AS seen WHERE seen.id = :after AND seen.uid = :uid))
ORDER BY submitted_at DESC, rowid DESC LIMIT :limit;

-- name: expired_jobs
-- Jobs that ended long ago.
SELECT id, uid FROM jobs WHERE ended_at < :before;

-- name: largest_results
-- What one user's finished jobs keep, oldest first, for the quota.
SELECT id, uid, result_size FROM jobs WHERE uid = :uid AND ended_at IS NOT NULL ORDER BY ended_at;

-- name: stored_bytes
-- What each user's results take.
SELECT uid, sum(result_size) AS bytes FROM jobs WHERE ended_at IS NOT NULL GROUP BY uid;

-- name: delete_job
-- Forget a job, its attempts and items.
DELETE FROM jobs WHERE id = :id;
