-- The state of jobs, the history of runs and skips, and the queue of dirty buckets.

CREATE TABLE {schema}.migration (
    version     integer     PRIMARY KEY,
    name        text        NOT NULL,
    applied_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE  {schema}.migration            IS 'Schema upgrades that have been applied, by number.';
COMMENT ON COLUMN {schema}.migration.version    IS 'Number of the upgrade; the highest is the version of the schema.';
COMMENT ON COLUMN {schema}.migration.name       IS 'What the upgrade is called.';
COMMENT ON COLUMN {schema}.migration.applied_at IS 'When it was applied.';

CREATE TABLE {schema}.state (
    job                text        PRIMARY KEY,
    last_started_at    timestamptz,
    last_completed_at  timestamptz,
    last_outcome       text,
    last_run_id        text,
    paused             boolean     NOT NULL DEFAULT false
) WITH (fillfactor = 50);
COMMENT ON TABLE  {schema}.state                   IS 'One row for each job: a batch, a group of a batch, or a grain of a rollup.';
COMMENT ON COLUMN {schema}.state.job               IS 'Name of the job: daily, daily/upload, trend/1m.';
COMMENT ON COLUMN {schema}.state.last_started_at   IS 'When the job last started, by the clock of this database.';
COMMENT ON COLUMN {schema}.state.last_completed_at IS 'When the job last completed, whatever the outcome; a crashed run does not count.';
COMMENT ON COLUMN {schema}.state.last_outcome      IS 'How the job last ended.';
COMMENT ON COLUMN {schema}.state.last_run_id       IS 'The run that last started; rollups have none.';
COMMENT ON COLUMN {schema}.state.paused            IS 'True while starts of the job are refused.';

CREATE TABLE {schema}.run (
    run_id           text        PRIMARY KEY,
    batch            text        NOT NULL,
    job              text        NOT NULL,
    groups           text[]      NOT NULL,
    host             text        NOT NULL,
    hostname         text        NOT NULL,
    boot_id          text        NOT NULL,
    pid              integer     NOT NULL,
    pid_start_ticks  bigint      NOT NULL,
    started_at       timestamptz NOT NULL DEFAULT now(),
    heartbeat_at     timestamptz NOT NULL DEFAULT now(),
    claimed_until    timestamptz NOT NULL,
    finished_at      timestamptz,
    outcome          text        CHECK (outcome IN ('success', 'partial', 'failed', 'timeout', 'stopped', 'crashed')),
    reason           text,
    whole            boolean     NOT NULL,
    config_hash      text        NOT NULL
);
-- At most one live run for each batch: decided by this index, not by looking first.
CREATE UNIQUE INDEX run_one_live ON {schema}.run (batch) WHERE outcome IS NULL;
CREATE INDEX run_by_start ON {schema}.run (started_at);
COMMENT ON TABLE  {schema}.run                 IS 'Each start of a batch that the guards allowed.';
COMMENT ON COLUMN {schema}.run.run_id          IS 'Identifier of the run; the start in UTC and a random part.';
COMMENT ON COLUMN {schema}.run.batch           IS 'Name of the batch.';
COMMENT ON COLUMN {schema}.run.job             IS 'What was asked for: the batch, or one of its groups (daily/upload).';
COMMENT ON COLUMN {schema}.run.groups          IS 'Groups whose steps took part.';
COMMENT ON COLUMN {schema}.run.host            IS 'Random identifier of the state directory that the run belongs to.';
COMMENT ON COLUMN {schema}.run.hostname        IS 'Name of the machine, for people.';
COMMENT ON COLUMN {schema}.run.boot_id         IS 'Identifier of the boot of that machine, so that a process id means something.';
COMMENT ON COLUMN {schema}.run.pid             IS 'Process id of batchctl.';
COMMENT ON COLUMN {schema}.run.pid_start_ticks IS 'Start of that process in kernel ticks since boot, so that a reused process id is noticed.';
COMMENT ON COLUMN {schema}.run.started_at      IS 'When the run started, by the clock of this database.';
COMMENT ON COLUMN {schema}.run.heartbeat_at    IS 'When the run was last heard of.';
COMMENT ON COLUMN {schema}.run.claimed_until   IS 'Until when another host must take the run to be alive.';
COMMENT ON COLUMN {schema}.run.finished_at     IS 'When it completed; a crashed run has no completion.';
COMMENT ON COLUMN {schema}.run.outcome         IS 'success, partial, failed, timeout, stopped or crashed; NULL while the run is live.';
COMMENT ON COLUMN {schema}.run.reason          IS 'What ended the run, in words, where the outcome does not say it.';
COMMENT ON COLUMN {schema}.run.whole           IS 'True if every step of the job took part for every account.';
COMMENT ON COLUMN {schema}.run.config_hash     IS 'Hash of the configuration of the batch at the start.';

CREATE TABLE {schema}.step_run (
    run_id           text        NOT NULL REFERENCES {schema}.run ON DELETE CASCADE,
    account          text        NOT NULL,
    step             text        NOT NULL,
    attempt          integer     NOT NULL,
    step_group       text,
    pid              integer,
    pid_start_ticks  bigint,
    started_at       timestamptz NOT NULL,
    finished_at      timestamptz,
    outcome          text        CHECK (outcome IN ('success', 'failed', 'timeout', 'stopped', 'crashed')),
    reason           text,
    exit_code        integer,
    signal           integer,
    quantity         integer     NOT NULL,
    log              text        NOT NULL,
    PRIMARY KEY (run_id, account, step, attempt)
);
COMMENT ON TABLE  {schema}.step_run                 IS 'Each attempt at a step of a run, for an account.';
COMMENT ON COLUMN {schema}.step_run.run_id          IS 'The run.';
COMMENT ON COLUMN {schema}.step_run.account         IS 'The account.';
COMMENT ON COLUMN {schema}.step_run.step            IS 'The step.';
COMMENT ON COLUMN {schema}.step_run.attempt         IS 'Number of the attempt, from 1.';
COMMENT ON COLUMN {schema}.step_run.step_group      IS 'Group of the step, if it has one.';
COMMENT ON COLUMN {schema}.step_run.pid             IS 'Process id of the command, which leads its own session and process group.';
COMMENT ON COLUMN {schema}.step_run.pid_start_ticks IS 'Start of that process in kernel ticks since boot.';
COMMENT ON COLUMN {schema}.step_run.started_at      IS 'When the attempt started.';
COMMENT ON COLUMN {schema}.step_run.finished_at     IS 'When it ended; NULL while it runs, or if batchctl died before it knew.';
COMMENT ON COLUMN {schema}.step_run.outcome         IS 'success, failed, timeout, stopped or crashed; NULL while it runs.';
COMMENT ON COLUMN {schema}.step_run.reason          IS 'What ended the attempt, in words, where the numbers do not say it.';
COMMENT ON COLUMN {schema}.step_run.exit_code       IS 'Exit code, if the command exited.';
COMMENT ON COLUMN {schema}.step_run.signal          IS 'Number of the signal that killed the command, if one did.';
COMMENT ON COLUMN {schema}.step_run.quantity        IS 'Quantity that the step was given.';
COMMENT ON COLUMN {schema}.step_run.log             IS 'File that holds the output.';

CREATE TABLE {schema}.skip (
    skip_id  bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job      text        NOT NULL,
    at       timestamptz NOT NULL DEFAULT now(),
    last_at  timestamptz NOT NULL DEFAULT now(),
    reason   text        NOT NULL,
    detail   text        NOT NULL,
    count    integer     NOT NULL DEFAULT 1
);
CREATE INDEX skip_by_job ON {schema}.skip (job, skip_id);
CREATE INDEX skip_by_time ON {schema}.skip (last_at);
COMMENT ON TABLE  {schema}.skip         IS 'Starts that a guard refused, and why.';
COMMENT ON COLUMN {schema}.skip.skip_id IS 'Number of the row.';
COMMENT ON COLUMN {schema}.skip.job     IS 'The job that did not start.';
COMMENT ON COLUMN {schema}.skip.at      IS 'When it was first skipped.';
COMMENT ON COLUMN {schema}.skip.last_at IS 'When it was last skipped in the same series.';
COMMENT ON COLUMN {schema}.skip.reason  IS 'running, orphans, running_elsewhere, gap, not_due, outside_hours, paused or disabled.';
COMMENT ON COLUMN {schema}.skip.detail  IS 'The same in words, as it was logged.';
COMMENT ON COLUMN {schema}.skip.count   IS 'How many skips in a row this row stands for.';

CREATE TABLE {schema}.rollup (
    rollup             text        PRIMARY KEY,
    definition         jsonb       NOT NULL,
    migrated_at        timestamptz NOT NULL DEFAULT now(),
    history_queued_at  timestamptz
);
COMMENT ON TABLE  {schema}.rollup                   IS 'Rollups whose tables and change tracking exist.';
COMMENT ON COLUMN {schema}.rollup.rollup            IS 'Name of the rollup.';
COMMENT ON COLUMN {schema}.rollup.definition        IS 'Source, columns, measures and tables as they were made.';
COMMENT ON COLUMN {schema}.rollup.migrated_at       IS 'When they were made.';
COMMENT ON COLUMN {schema}.rollup.history_queued_at IS 'When the events that were there before were queued; NULL until then.';

CREATE TABLE {schema}.dirty_bucket (
    rollup  text        NOT NULL,
    grain   text        NOT NULL,
    bucket  timestamptz NOT NULL
);
-- No unique index: writers of events append here in their own transactions and must never wait for each other.
-- Without a key, a publication of all tables would refuse every delete here.
ALTER TABLE {schema}.dirty_bucket REPLICA IDENTITY FULL;
CREATE INDEX dirty_bucket_queue ON {schema}.dirty_bucket (rollup, grain, bucket);
COMMENT ON TABLE  {schema}.dirty_bucket        IS 'Queue of buckets whose source changed since they were last computed.';
COMMENT ON COLUMN {schema}.dirty_bucket.rollup IS 'The rollup.';
COMMENT ON COLUMN {schema}.dirty_bucket.grain  IS 'The grain whose table is out of date.';
COMMENT ON COLUMN {schema}.dirty_bucket.bucket IS 'Start of the bucket; -infinity stands for every bucket of the table.';
