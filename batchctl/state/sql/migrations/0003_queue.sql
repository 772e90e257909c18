-- What triggers note is told from what a tick has sorted into the queue; a tick remembers what it has seen, so that it
-- need not look at what is gone; local days.

-- Identical texts compare quickest by their bytes. Notes are found by the transactions that wrote them: those that were
-- seen before need not be looked at, even while an old snapshot keeps what was deleted in the index.
ALTER TABLE {schema}.dirty_bucket
    ALTER COLUMN rollup TYPE text COLLATE "C",
    ALTER COLUMN grain TYPE text COLLATE "C",
    ADD COLUMN xid xid8 NOT NULL DEFAULT pg_current_xact_id();
DROP INDEX {schema}.dirty_bucket_queue;
CREATE INDEX dirty_bucket_unseen ON {schema}.dirty_bucket (rollup, grain, xid, bucket);
COMMENT ON TABLE  {schema}.dirty_bucket     IS 'Notes of buckets whose source changed, as triggers append them; the next tick sorts them into queued_bucket.';
COMMENT ON COLUMN {schema}.dirty_bucket.xid IS 'Transaction that noted the change.';

CREATE TABLE {schema}.queued_bucket (
    rollup  text COLLATE "C" NOT NULL,
    grain   text COLLATE "C" NOT NULL,
    bucket  timestamptz      NOT NULL,
    PRIMARY KEY (rollup, grain, bucket)
);
COMMENT ON TABLE  {schema}.queued_bucket        IS 'Queue of buckets that are to be computed anew; only the tick that holds the job writes here.';
COMMENT ON COLUMN {schema}.queued_bucket.rollup IS 'The rollup.';
COMMENT ON COLUMN {schema}.queued_bucket.grain  IS 'The grain whose table is out of date.';
COMMENT ON COLUMN {schema}.queued_bucket.bucket IS 'Start of the bucket.';

ALTER TABLE {schema}.state
    ADD COLUMN notes_seen       pg_snapshot,
    ADD COLUMN notes_seen_in    text,
    ADD COLUMN queued_from      timestamptz,
    ADD COLUMN aggregated_until timestamptz;
COMMENT ON COLUMN {schema}.state.notes_seen       IS 'Of a grain: every note that this snapshot shows has been sorted into the queue.';
COMMENT ON COLUMN {schema}.state.notes_seen_in    IS 'Of a grain: the cluster and database in which that snapshot means something.';
COMMENT ON COLUMN {schema}.state.queued_from      IS 'Of a grain: no bucket before this one is in the queue; NULL if none is at all.';
COMMENT ON COLUMN {schema}.state.aggregated_until IS 'Of a grain: every closed bucket before this instant has been looked at once.';

CREATE FUNCTION {schema}.local_day(instant timestamptz, zone text) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
    -- Midnight, by the offset that PostgreSQL takes and by the one that was in force half a day before. They differ where
    -- a day's midnight comes twice or not at all; the day begins with the first instant that has its date.
    SELECT CASE
        WHEN (candidate.early AT TIME ZONE zone)::date = candidate.date THEN least(candidate.early, candidate.plain)
        ELSE candidate.plain
    END
    FROM (
        SELECT
            midnight.date,
            midnight.plain,
            (midnight.date::timestamp
                - (((midnight.plain - interval '12 hours') AT TIME ZONE zone)
                    - ((midnight.plain - interval '12 hours') AT TIME ZONE 'UTC'))) AT TIME ZONE 'UTC' AS early
        FROM (
            SELECT local.date, local.date::timestamp AT TIME ZONE zone AS plain
            FROM (SELECT (instant AT TIME ZONE zone)::date AS date) AS local
        ) AS midnight
    ) AS candidate;
END;
COMMENT ON FUNCTION {schema}.local_day(timestamptz, text) IS 'The first instant of the local day that an instant lies in.';
