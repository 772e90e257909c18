-- name: lock_job
-- Serialise starts of a batch over all hosts: the row is made if need be, and locked until the transaction ends.
INSERT INTO {schema}.state AS s (job) VALUES (%(job)s)
ON CONFLICT (job) DO UPDATE SET job = s.job;

-- name: bound
-- A start never waits for long: neither for a lock that somebody holds, nor holding one for a client that is gone.
SELECT set_config('lock_timeout', '10s', true) AS lock_timeout,
       set_config('statement_timeout', '15s', true) AS statement_timeout,
       set_config('idle_in_transaction_session_timeout', '20s', true) AS idle_timeout;

-- name: now
-- The only clock that decides; read after the lock was obtained, so that waiting for it does not turn it back.
SELECT clock_timestamp() AS now;

-- name: close_dead
-- Close runs whose processes are known to be gone (this host's, checked before) and those whose claim has run out.
WITH dead AS (
    UPDATE {schema}.run SET outcome = 'crashed', reason = %(reason)s
    WHERE batch = %(batch)s AND outcome IS NULL AND (host = %(host)s OR claimed_until < clock_timestamp())
    RETURNING run_id, host, hostname, pid
), steps AS (
    UPDATE {schema}.step_run SET outcome = 'crashed'
    WHERE outcome IS NULL AND run_id IN (SELECT run_id FROM dead)
), jobs AS (
    -- A start that came to nothing does not keep `every` from the next one.
    UPDATE {schema}.state AS s SET last_outcome = 'crashed', last_started_at = (
        SELECT max(r.started_at) FROM {schema}.run r
        WHERE r.batch = %(batch)s AND r.outcome IS NOT NULL AND r.outcome <> 'crashed'
          AND (s.job = r.batch OR s.job = ANY(SELECT r.batch || '/' || name FROM unnest(r.groups) AS name))
    )
    WHERE last_run_id IN (SELECT run_id FROM dead)
)
SELECT run_id, hostname, pid FROM dead;

-- name: live
-- The live run of a batch, wherever it is.
SELECT run_id, host, hostname, pid, pid_start_ticks, boot_id, started_at, claimed_until
FROM {schema}.run WHERE batch = %(batch)s AND outcome IS NULL;

-- name: one
-- A run by its id.
SELECT run_id, batch, host, hostname, outcome, finished_at, claimed_until FROM {schema}.run WHERE run_id = %(run_id)s;

-- name: unfinished
-- Processes that unfinished runs of this host wrote down.
SELECT r.run_id, NULL AS account, NULL AS step, r.pid, r.pid_start_ticks, r.boot_id
FROM {schema}.run r WHERE r.batch = %(batch)s AND r.host = %(host)s AND r.outcome IS NULL
UNION ALL
SELECT s.run_id, s.account, s.step, s.pid, s.pid_start_ticks, r.boot_id
FROM {schema}.step_run s JOIN {schema}.run r USING (run_id)
WHERE r.batch = %(batch)s AND r.host = %(host)s AND r.outcome IS NULL AND s.finished_at IS NULL AND s.pid IS NOT NULL;

-- name: job
-- The state of a job; no row means that it never started.
SELECT last_started_at, last_completed_at, paused FROM {schema}.state WHERE job = %(job)s;

-- name: estimate
-- How long the job takes: the median of its last ten successes that left nothing out.
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM finished_at - started_at)) AS seconds
FROM (
    SELECT started_at, finished_at FROM {schema}.run
    WHERE job = %(job)s AND outcome = 'success' AND whole ORDER BY started_at DESC LIMIT 10
) AS latest;

-- name: claim
-- Claim the batch; no row comes back if another run is live, which the unique index decides.
INSERT INTO {schema}.run (run_id, batch, job, groups, host, hostname, boot_id, pid, pid_start_ticks,
                          started_at, heartbeat_at, claimed_until, whole, config_hash)
VALUES (%(run_id)s, %(batch)s, %(job)s, %(groups)s, %(host)s, %(hostname)s, %(boot_id)s, %(pid)s, %(pid_start_ticks)s,
        %(now)s, %(now)s, %(now)s + %(claim)s, %(whole)s, %(config_hash)s)
ON CONFLICT (batch) WHERE outcome IS NULL DO NOTHING
RETURNING run_id;

-- name: mark_started
-- A start counts for the batch and for each group that takes part.
INSERT INTO {schema}.state (job, last_started_at, last_run_id)
SELECT job, %(now)s, %(run_id)s FROM unnest(%(jobs)s::text[]) AS job
ON CONFLICT (job) DO UPDATE SET last_started_at = EXCLUDED.last_started_at, last_run_id = EXCLUDED.last_run_id;

-- name: step_started
-- Record an attempt at a step as soon as its process exists.
WITH heard AS (UPDATE {schema}.run SET heartbeat_at = clock_timestamp() WHERE run_id = %(run_id)s)
INSERT INTO {schema}.step_run (run_id, account, step, attempt, step_group, pid, pid_start_ticks, started_at, quantity, log)
VALUES (%(run_id)s, %(account)s, %(step)s, %(attempt)s, %(group)s, %(pid)s, %(pid_start_ticks)s,
        coalesce(%(at)s::timestamptz, clock_timestamp()), %(quantity)s, %(log)s)
ON CONFLICT (run_id, account, step, attempt) DO NOTHING;

-- name: step_finished
-- Record how an attempt ended.
WITH heard AS (UPDATE {schema}.run SET heartbeat_at = clock_timestamp() WHERE run_id = %(run_id)s)
INSERT INTO {schema}.step_run (run_id, account, step, attempt, step_group, started_at, finished_at, outcome, reason,
                               exit_code, signal, quantity, log)
VALUES (%(run_id)s, %(account)s, %(step)s, %(attempt)s, %(group)s,
        coalesce(%(at)s::timestamptz, clock_timestamp()) - %(duration)s::interval,
        coalesce(%(at)s::timestamptz, clock_timestamp()),
        %(outcome)s, %(reason)s, %(exit_code)s, %(signal)s, %(quantity)s, %(log)s)
ON CONFLICT (run_id, account, step, attempt) DO UPDATE
SET finished_at = EXCLUDED.finished_at, outcome = EXCLUDED.outcome, reason = EXCLUDED.reason,
    exit_code = EXCLUDED.exit_code, signal = EXCLUDED.signal;

-- name: run_finished
-- Record the end of a run, and the completion for the batch and each group that took part.
WITH ended AS (
    UPDATE {schema}.run
    SET outcome = %(outcome)s, reason = %(reason)s, finished_at = coalesce(%(at)s::timestamptz, clock_timestamp())
    WHERE run_id = %(run_id)s AND finished_at IS NULL
    RETURNING finished_at
), jobs AS (
    UPDATE {schema}.state
    SET last_completed_at = greatest(last_completed_at, ended.finished_at), last_outcome = %(outcome)s
    FROM ended WHERE job = ANY(%(jobs)s)
)
SELECT finished_at FROM ended;

-- name: skip
-- Record a start that a guard refused; a skip that had to wait in the journal comes with its own time, once.
INSERT INTO {schema}.skip (job, reason, detail, at, last_at)
SELECT %(job)s, %(reason)s, %(detail)s, at, at FROM (SELECT coalesce(%(at)s::timestamptz, clock_timestamp()) AS at) AS t
WHERE NOT EXISTS (SELECT FROM {schema}.skip WHERE job = %(job)s AND last_at = t.at);

-- name: skip_in_series
-- The same for a job that is skipped every minute: one row for a series of equal reasons without a start in between.
WITH latest AS (
    SELECT skip_id, reason, last_at FROM {schema}.skip WHERE job = %(job)s ORDER BY skip_id DESC LIMIT 1
), counted AS (
    UPDATE {schema}.skip s SET count = count + 1, last_at = now(), detail = %(detail)s
    FROM latest
    WHERE s.skip_id = latest.skip_id AND latest.reason = %(reason)s
      AND NOT EXISTS (SELECT FROM {schema}.state WHERE job = %(job)s AND last_started_at > latest.last_at)
    RETURNING s.skip_id
)
INSERT INTO {schema}.skip (job, reason, detail)
SELECT %(job)s, %(reason)s, %(detail)s WHERE NOT EXISTS (SELECT FROM counted);

-- name: jobs
-- State of all jobs with the live run that each belongs to.
SELECT s.job, s.last_started_at, s.last_completed_at, s.last_outcome, s.paused,
       r.run_id, r.job AS run_job, r.host, r.hostname, r.pid, r.pid_start_ticks, r.boot_id, r.started_at, r.groups,
       r.claimed_until, clock_timestamp() AS now
FROM {schema}.state s
LEFT JOIN {schema}.run r ON r.run_id = s.last_run_id AND r.outcome IS NULL
ORDER BY s.job;

-- name: history
-- What ran and what was skipped, newest first.
SELECT * FROM (
    (SELECT 'run' AS kind, job, started_at AS at, outcome, reason, run_id,
            extract(epoch FROM finished_at - started_at)::float8 AS duration_seconds, NULL AS detail, 1 AS count
     FROM {schema}.run
     WHERE %(job)s::text IS NULL OR job = %(job)s OR batch = %(job)s
     ORDER BY started_at DESC LIMIT %(limit)s)
    UNION ALL
    (SELECT 'skip', job, last_at, 'skipped', reason, NULL, NULL, detail, count
     FROM {schema}.skip
     WHERE %(job)s::text IS NULL OR job = %(job)s OR starts_with(job, %(job)s || '/')
     ORDER BY last_at DESC LIMIT %(limit)s)
) AS entries
ORDER BY at DESC, kind LIMIT %(limit)s;
