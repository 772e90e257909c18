-- name: lock_job
-- Serialise starts of a batch over all hosts: the row is made if need be, and locked until the transaction ends.
INSERT INTO {schema}.state AS s (job) VALUES (%(job)s)
ON CONFLICT (job) DO UPDATE SET job = s.job;

-- name: now
-- The only clock that decides; read after the lock was obtained, so that waiting for it does not turn it back.
SELECT clock_timestamp() AS now;

-- name: correct_future
-- Bring back instants that lie ahead because this database's clock was: a job is never blocked longer than by its gap.
UPDATE {schema}.state
SET last_started_at = least(last_started_at, %(now)s), last_completed_at = least(last_completed_at, %(now)s)
WHERE (job = %(batch)s OR starts_with(job, %(batch)s || '/'))
  AND greatest(last_started_at, last_completed_at) > %(now)s
RETURNING job;

-- name: close_dead
-- Close runs whose processes are known to be gone (this host's, checked before) and those whose claim has run out.
WITH dead AS (
    UPDATE {schema}.run SET outcome = 'crashed', reason = %(reason)s
    WHERE batch = %(batch)s AND outcome IS NULL AND (host = %(host)s OR claimed_until < clock_timestamp())
    RETURNING run_id
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
SELECT run_id FROM dead;

-- name: live
-- The live run of a batch, wherever it is.
SELECT run_id, host, hostname, pid, pid_start_ticks, boot_id, started_at
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
-- The state of a job, which never started if it has no times, and what is paused of all that would start with it.
SELECT s.last_started_at, s.last_completed_at,
       ARRAY(SELECT p.job FROM {schema}.state p WHERE p.paused AND p.job = ANY(%(jobs)s) ORDER BY p.job) AS paused
FROM (SELECT) AS always LEFT JOIN {schema}.state s ON s.job = %(job)s;

-- name: pause
-- Refuse starts of a job; no row comes back if it was paused before.
INSERT INTO {schema}.state AS s (job, paused) VALUES (%(job)s, true)
ON CONFLICT (job) DO UPDATE SET paused = true WHERE NOT s.paused
RETURNING job;

-- name: unpause
-- Allow starts of a job and of all below it again.
UPDATE {schema}.state SET paused = false
WHERE paused AND (job = %(job)s OR starts_with(job, %(job)s || '/'))
RETURNING job;

-- name: paused
-- Which of these jobs are paused.
SELECT job FROM {schema}.state WHERE paused AND job = ANY(%(jobs)s) ORDER BY job;

-- name: past_runs
-- The last ten successes of a job that left nothing out, newest first, with a row for each of their steps: its seconds
-- from the first attempt to the end of the last. By them the next run is estimated. Those of the whole batch stand in for
-- a group that has none of its own.
WITH latest AS (
    SELECT run_id, job, started_at,
           extract(epoch FROM coalesce(duration, finished_at - started_at))::float8 AS seconds
    FROM {schema}.run
    WHERE job = CASE WHEN EXISTS (SELECT FROM {schema}.run
                                  WHERE job = %(job)s AND outcome = 'success' AND whole AND resumed = 0)
                     THEN %(job)s ELSE split_part(%(job)s, '/', 1) END
      AND outcome = 'success' AND whole AND resumed = 0 ORDER BY started_at DESC LIMIT 10
)
SELECT latest.run_id, latest.job <> %(job)s AS of_batch, latest.seconds, s.account, s.step, max(s.quantity) AS quantity,
       greatest(extract(epoch FROM max(s.finished_at) - min(s.started_at)), 0)::float8 AS step_seconds
FROM latest LEFT JOIN {schema}.step_run s ON s.run_id = latest.run_id AND s.finished_at IS NOT NULL
GROUP BY latest.run_id, latest.job, latest.started_at, latest.seconds, s.account, s.step
ORDER BY latest.started_at DESC, latest.run_id, s.account, s.step;

-- name: latest_durations
-- How long the last ten runs took that left nothing out and came to their end, oldest first.
SELECT seconds, success FROM (
    SELECT extract(epoch FROM coalesce(duration, finished_at - started_at))::float8 AS seconds,
           outcome = 'success' AS success, started_at
    FROM {schema}.run
    WHERE job = %(job)s AND outcome IN ('success', 'partial', 'timeout') AND whole AND resumed = 0
    ORDER BY started_at DESC LIMIT 10
) AS latest ORDER BY started_at;

-- name: claim
-- Claim the batch; no row comes back if another run is live, which the unique index decides.
INSERT INTO {schema}.run (run_id, batch, job, groups, accounts, steps, host, hostname, boot_id, pid, pid_start_ticks,
                          started_at, heartbeat_at, claimed_until, whole, config_hash)
VALUES (%(run_id)s, %(batch)s, %(job)s, %(groups)s, %(accounts)s, %(steps)s,
        %(host)s, %(hostname)s, %(boot_id)s, %(pid)s, %(pid_start_ticks)s,
        %(now)s, %(now)s, %(now)s + %(claim)s, %(whole)s, %(config_hash)s)
ON CONFLICT (batch) WHERE outcome IS NULL DO NOTHING
RETURNING run_id, started_at, resumed;

-- name: resume
-- Claim the batch for a run that has ended without success; no row comes back if it has been continued meanwhile.
UPDATE {schema}.run
SET outcome = NULL, reason = NULL, finished_at = NULL, duration = NULL, stop_requested = NULL, resumed = resumed + 1,
    host = %(host)s, hostname = %(hostname)s, boot_id = %(boot_id)s, pid = %(pid)s,
    pid_start_ticks = %(pid_start_ticks)s, heartbeat_at = %(now)s, claimed_until = %(now)s + %(claim)s,
    config_hash = %(config_hash)s
WHERE run_id = %(run_id)s AND outcome <> 'success' AND resumed = %(resumed)s
RETURNING run_id, started_at, resumed;

-- name: run_started
-- Record a claim again that the database has lost, as a standby may that took over, or that the run has been continued;
-- nothing happens if it is known, or if another run is live.
WITH lost AS (
    INSERT INTO {schema}.run AS r (run_id, batch, job, groups, accounts, steps, host, hostname, boot_id, pid,
                                   pid_start_ticks, started_at, heartbeat_at, claimed_until, whole, config_hash, resumed)
    SELECT %(run_id)s, %(batch)s, %(job)s, %(groups)s::text[], %(accounts)s::text[], %(steps)s::text[],
           %(host)s, %(hostname)s, %(boot_id)s, %(pid)s::integer, %(pid_start_ticks)s::bigint,
           %(started_at)s::timestamptz, coalesce(%(at)s::timestamptz, clock_timestamp()),
           %(claimed_until)s::timestamptz, %(whole)s, %(config_hash)s, %(resumed)s
    WHERE NOT EXISTS (SELECT FROM {schema}.run WHERE batch = %(batch)s AND outcome IS NULL AND run_id <> %(run_id)s)
    ON CONFLICT (run_id) DO UPDATE
    SET outcome = NULL, reason = NULL, finished_at = NULL, duration = NULL, host = EXCLUDED.host,
        hostname = EXCLUDED.hostname, boot_id = EXCLUDED.boot_id, pid = EXCLUDED.pid,
        pid_start_ticks = EXCLUDED.pid_start_ticks, heartbeat_at = EXCLUDED.heartbeat_at,
        claimed_until = EXCLUDED.claimed_until, resumed = EXCLUDED.resumed
    WHERE r.resumed < EXCLUDED.resumed
    RETURNING run_id, started_at
)
INSERT INTO {schema}.state (job, last_started_at, last_run_id)
SELECT job, lost.started_at, lost.run_id FROM lost, unnest(%(jobs)s::text[]) AS job
ON CONFLICT (job) DO UPDATE
SET last_started_at = greatest(state.last_started_at, EXCLUDED.last_started_at), last_run_id = EXCLUDED.last_run_id;

-- name: withdraw
-- Give up a claim that was granted without the answer being heard: the next start, on any host, closes the run as dead.
UPDATE {schema}.run SET claimed_until = least(claimed_until, clock_timestamp())
WHERE run_id = %(run_id)s AND resumed = %(resumed)s AND outcome IS NULL;

-- name: heartbeat
-- Say that a run is alive, prolong its lease if it has one, and hear what it is asked; no row if it is not ours any more.
UPDATE {schema}.run
SET heartbeat_at = clock_timestamp(),
    claimed_until = CASE WHEN %(lease)s::interval IS NULL THEN claimed_until
                         ELSE clock_timestamp() + %(lease)s::interval END
WHERE run_id = %(run_id)s AND outcome IS NULL AND resumed = %(resumed)s
RETURNING stop_requested;

-- name: request_stop
-- Ask the live run of a batch on another host to end; it looks at each heartbeat.
UPDATE {schema}.run SET stop_requested = %(how)s WHERE run_id = %(run_id)s AND outcome IS NULL RETURNING run_id;

-- name: resumable
-- The run that --resume means: the named one, else the latest without success that no later success has made up for.
SELECT run_id, job, accounts, steps, outcome, resumed
FROM {schema}.run r
WHERE batch = %(batch)s AND (%(job)s::text IS NULL OR job = %(job)s)
  AND CASE WHEN %(run_id)s::text IS NOT NULL THEN run_id = %(run_id)s
      ELSE outcome IS DISTINCT FROM 'success' AND NOT EXISTS (
          SELECT FROM {schema}.run later
          WHERE later.batch = r.batch AND later.job IN (r.job, r.batch) AND later.started_at > r.started_at
            AND later.outcome = 'success'
            AND (later.whole OR (later.accounts, later.steps) IS NOT DISTINCT FROM (r.accounts, r.steps)))
      END
ORDER BY started_at DESC LIMIT 1;

-- name: attempts
-- The latest attempt at each step of a run.
SELECT DISTINCT ON (account, step) account, step, step_group, attempt, outcome, exit_code, signal, reason, quantity, log,
       config_hash, extract(epoch FROM finished_at - started_at)::float8 AS duration_seconds
FROM {schema}.step_run WHERE run_id = %(run_id)s ORDER BY account, step, attempt DESC;

-- name: mark_resumed
-- A run that goes on is again the one its jobs belong to. It is no new start, but counts as one if a crash undid it.
INSERT INTO {schema}.state (job, last_started_at, last_run_id)
SELECT job, %(started_at)s, %(run_id)s FROM unnest(%(jobs)s::text[]) AS job
ON CONFLICT (job) DO UPDATE
SET last_started_at = greatest(state.last_started_at, EXCLUDED.last_started_at), last_run_id = EXCLUDED.last_run_id;

-- name: mark_started
-- A start counts for the batch and for each group that takes part.
INSERT INTO {schema}.state (job, last_started_at, last_run_id)
SELECT job, %(now)s, %(run_id)s FROM unnest(%(jobs)s::text[]) AS job
ON CONFLICT (job) DO UPDATE SET last_started_at = EXCLUDED.last_started_at, last_run_id = EXCLUDED.last_run_id;

-- name: step_started
-- Record an attempt at a step as soon as its process exists. A crash of the server may lose it: its end is recorded
-- anew, and its process has other witnesses. So it does not wait for the disk. What an earlier part of the run recorded
-- late under the same number gives way.
INSERT INTO {schema}.step_run (run_id, account, step, attempt, resumed, step_group, pid, pid_start_ticks, started_at,
                               quantity, log, config_hash)
SELECT %(run_id)s, %(account)s, %(step)s, %(attempt)s, %(resumed)s, %(group)s, %(pid)s, %(pid_start_ticks)s,
       coalesce(%(at)s::timestamptz, clock_timestamp()), %(quantity)s, %(log)s, %(config_hash)s
FROM set_config('synchronous_commit', 'off', true)
ON CONFLICT (run_id, account, step, attempt) DO UPDATE
SET resumed = EXCLUDED.resumed, pid = EXCLUDED.pid, pid_start_ticks = EXCLUDED.pid_start_ticks,
    started_at = EXCLUDED.started_at, finished_at = NULL, outcome = NULL, reason = NULL, exit_code = NULL, signal = NULL,
    quantity = EXCLUDED.quantity, log = EXCLUDED.log, config_hash = EXCLUDED.config_hash
WHERE step_run.resumed < EXCLUDED.resumed;

-- name: step_finished
-- Record how an attempt ended, once; a record of an earlier part of the run gives way to one of a later part.
INSERT INTO {schema}.step_run (run_id, account, step, attempt, resumed, step_group, started_at, finished_at, outcome,
                               reason, exit_code, signal, quantity, log, config_hash)
VALUES (%(run_id)s, %(account)s, %(step)s, %(attempt)s, %(resumed)s, %(group)s,
        coalesce(%(at)s::timestamptz, clock_timestamp()) - %(duration)s::interval,
        coalesce(%(at)s::timestamptz, clock_timestamp()),
        %(outcome)s, %(reason)s, %(exit_code)s, %(signal)s, %(quantity)s, %(log)s, %(config_hash)s)
ON CONFLICT (run_id, account, step, attempt) DO UPDATE
SET resumed = EXCLUDED.resumed, finished_at = EXCLUDED.finished_at, outcome = EXCLUDED.outcome, reason = EXCLUDED.reason,
    exit_code = EXCLUDED.exit_code, signal = EXCLUDED.signal, config_hash = EXCLUDED.config_hash
WHERE step_run.resumed < EXCLUDED.resumed OR (step_run.resumed = EXCLUDED.resumed AND step_run.finished_at IS NULL);

-- name: run_finished
-- Record the end of a run, once, and the completion for the batch and each group that took part. A run that the database
-- has lost is recorded with its end, also while another one is live.
WITH known AS (
    UPDATE {schema}.run
    SET outcome = %(outcome)s, reason = %(reason)s, finished_at = coalesce(%(at)s::timestamptz, clock_timestamp()),
        duration = %(duration)s::interval, resumed = %(resumed)s
    WHERE run_id = %(run_id)s AND (resumed < %(resumed)s OR (resumed = %(resumed)s AND finished_at IS NULL))
    RETURNING started_at, finished_at
), lost AS (
    INSERT INTO {schema}.run (run_id, batch, job, groups, accounts, steps, host, hostname, boot_id, pid, pid_start_ticks,
                              started_at, heartbeat_at, claimed_until, whole, config_hash, resumed,
                              outcome, reason, finished_at, duration)
    SELECT %(run_id)s, %(batch)s, %(job)s, %(groups)s::text[], %(accounts)s::text[], %(steps)s::text[],
           %(host)s, %(hostname)s, %(boot_id)s, %(pid)s::integer, %(pid_start_ticks)s::bigint,
           %(started_at)s::timestamptz, at, %(claimed_until)s::timestamptz, %(whole)s, %(config_hash)s, %(resumed)s,
           %(outcome)s, %(reason)s, at, %(duration)s::interval
    FROM (SELECT coalesce(%(at)s::timestamptz, clock_timestamp()) AS at) AS t
    -- What an earlier version left in a journal does not say which run it was.
    WHERE %(host)s::text IS NOT NULL AND NOT EXISTS (SELECT FROM {schema}.run WHERE run_id = %(run_id)s)
    ON CONFLICT (run_id) DO NOTHING
    RETURNING started_at, finished_at
), ended AS (
    SELECT * FROM known UNION ALL SELECT * FROM lost
), jobs AS (
    INSERT INTO {schema}.state AS s (job, last_started_at, last_completed_at, last_outcome, last_run_id)
    SELECT job, ended.started_at, ended.finished_at, %(outcome)s, %(run_id)s
    FROM ended, unnest(%(jobs)s::text[]) AS job
    ON CONFLICT (job) DO UPDATE
    SET last_started_at = greatest(s.last_started_at, EXCLUDED.last_started_at),
        last_completed_at = greatest(s.last_completed_at, EXCLUDED.last_completed_at),
        -- The end of an older run may come late.
        last_outcome = CASE WHEN s.last_completed_at > EXCLUDED.last_completed_at THEN s.last_outcome
                            ELSE EXCLUDED.last_outcome END,
        last_run_id = coalesce(s.last_run_id, EXCLUDED.last_run_id)
)
SELECT finished_at FROM ended;

-- name: skip
-- Record a start that a guard refused, once; a skip that had to wait in the journal comes with its own time.
INSERT INTO {schema}.skip (job, reason, detail, at, last_at, token)
SELECT %(job)s, %(reason)s, %(detail)s, at, at, %(token)s
FROM (SELECT coalesce(%(at)s::timestamptz, clock_timestamp()) AS at) AS t
-- Only what an earlier version left in a journal has no token.
WHERE %(token)s::text IS NOT NULL OR NOT EXISTS (SELECT FROM {schema}.skip WHERE job = %(job)s AND last_at = t.at)
ON CONFLICT (token) DO NOTHING;

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
       r.claimed_until, clock_timestamp() AS now,
       -- What counts if the live run turns out to have died: see close_dead.
       (SELECT max(e.started_at) FROM {schema}.run e
        WHERE e.batch = r.batch AND e.outcome <> 'crashed'
          AND (s.job = e.batch OR s.job = ANY(SELECT e.batch || '/' || name FROM unnest(e.groups) AS name))
       ) AS earlier_started_at
FROM {schema}.state s
LEFT JOIN {schema}.run r ON r.run_id = s.last_run_id AND r.outcome IS NULL
ORDER BY s.job;

-- name: history
-- What ran and what was skipped, newest first.
SELECT * FROM (
    (SELECT 'run' AS kind, job, started_at AS at, outcome, reason, run_id,
            extract(epoch FROM coalesce(duration, finished_at - started_at))::float8 AS duration_seconds,
            NULL AS detail, 1 AS count
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
