-- Statements of `rollup/`: the registry, the queue of dirty buckets, the tables, the refresh.
-- Buckets travel as whole seconds since 1970, because PostgreSQL knows years that Python's dates do not.
-- A bucket is closed if it comes before the one ({open}) that is open now, by the database's clock, less what the rollup
-- gives events to settle.

-- name: look
-- The versions of the schema, what was migrated, and what is remembered of the job. A session's first statement pays for
-- each table, function and operator that it names.
SELECT
    ARRAY(SELECT version FROM {schema}.migration) AS versions,
    date_part('epoch', now()) AS started,
    registered.definition,
    registered.history_queued_at IS NOT NULL AS history_queued,
    EXISTS (SELECT FROM {schema}.source_partition WHERE rollup = %(rollup)s) AS partitioned,
    system_identifier,
    current_database() AS database,
    pg_current_snapshot()::text AS snapshot,
    state.job IS NOT NULL AS known,
    state.paused,
    (SELECT paused FROM {schema}.state WHERE job = %(rollup)s) AS rollup_paused,
    date_part('epoch', state.queued_from) AS queued_from,
    {finer_until} AS finer_until,
    state.notes_seen::text AS notes_seen,
    state.notes_seen_in
FROM pg_control_system()
LEFT JOIN {schema}.rollup AS registered ON registered.rollup = %(rollup)s
LEFT JOIN {schema}.state AS state ON state.job = %(job)s

-- name: finer_until
-- How far the next finer grain has looked: a part of `look`.
(SELECT date_part('epoch', aggregated_until) FROM {schema}.state WHERE job = %(finer)s)

-- name: local_horizon
-- The bucket that is open now, how far a tick looks, and the bucket before: for local days, whose length differs.
SELECT
    extract(epoch FROM {open})::float8 AS open,
    extract(epoch FROM least({open}, {of_finer}))::float8 AS until,
    extract(epoch FROM {last})::float8 AS last

-- name: floor
-- The instant before which no bucket is computed anew.
SELECT
    extract(epoch FROM {floor})::float8 AS second, to_char({floor} AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS shown

-- name: noted
-- The buckets that unseen notes name, and the closed ones that wait in the queue: one more than `most_buckets` if there
-- are more, and of no more than `most_notes` notes. An indexed probe where there is nothing.
SELECT date_part('epoch', bucket) AS start, count(*) AS notes, pg_current_snapshot()::text AS snapshot{end}
FROM (
    (
        SELECT bucket FROM {schema}.dirty_bucket
        WHERE rollup = %(rollup)s AND grain = %(grain)s AND xid >= %(unseen_from)s::xid8
        LIMIT %(most_notes)s
    )
    {overtaken}
    {waiting}
) AS noted
GROUP BY bucket
LIMIT %(most_buckets)s + 1

-- name: local_end
-- The end of a closed bucket, for local days, whose length differs: a part of `noted`, like the next ones.
, CASE WHEN bucket < to_timestamp(%(open)s) THEN date_part('epoch', {next}) END AS end

-- name: overtaken
-- Notes of transactions that were in progress when notes were last looked for, in a condition of their own, because no
-- index serves both at once.
UNION ALL
(
    SELECT bucket FROM {schema}.dirty_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s AND xid = ANY (ARRAY({ended}))
    LIMIT %(most_notes)s
)

-- name: waiting
-- Closed buckets of the queue, no more than it takes to see that they are not few.
UNION ALL
(
    SELECT bucket FROM {schema}.queued_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s
        AND bucket >= (SELECT queued_from FROM {schema}.state WHERE job = %(job)s)
        AND bucket < to_timestamp(%(open)s)
    ORDER BY bucket LIMIT %(most_buckets)s + 1
)

-- name: ended
-- Which of them have ended in a snapshot. What is in progress still has no note to show, only many to look at.
SELECT xid FROM unnest(%(late)s::xid8[]) AS xid WHERE pg_visible_in_snapshot(xid, {snapshot})

-- name: add_state
-- The row of a job, whose lock stands for the job.
INSERT INTO {schema}.state (job) VALUES (%(job)s) ON CONFLICT DO NOTHING

-- name: nothing
-- A tick that found nothing to do, in one row version; not worth a wait for the disk.
WITH setting AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)),
held AS MATERIALIZED (
    SELECT job, notes_seen::text AS notes_seen FROM {schema}.state WHERE job = %(job)s FOR UPDATE SKIP LOCKED
), remembered AS (
    SELECT
        %(seen)s::text IS NOT NULL
            AND (held.notes_seen IS NOT DISTINCT FROM %(notes_seen)s::text OR %(notes_seen)s::text IS NULL) AS now
    FROM held
)
UPDATE {schema}.state AS state
SET last_started_at = to_timestamp(%(started)s), last_completed_at = clock_timestamp(), last_outcome = 'empty',
    aggregated_until = greatest(state.aggregated_until, to_timestamp(%(until)s)),
    -- Not if somebody else was done with notes since, or new tables are in place: what they left tells others of it.
    notes_seen = CASE WHEN remembered.now THEN %(seen)s::pg_snapshot ELSE state.notes_seen END,
    notes_seen_in = CASE WHEN remembered.now THEN %(here)s ELSE state.notes_seen_in END
FROM setting, held, remembered
WHERE state.job = held.job

-- name: steady
-- What a transaction reads must not depend on its role or host: rows that a policy hides are an error rather than a
-- smaller sum, and casts of times and numbers are in one form. Compiling a chunk's statement takes longer (0.1 s) than
-- running it. A chunk that a crash of the server loses is in the queue again, so it need not wait for the disk. Neither a
-- lock nor a client that is gone keeps the job for long. (GMT is UTC without a look into the files of time zones.)
SHOW work_mem;
SET LOCAL extra_float_digits = 1;
SET LOCAL row_security = off;
SET LOCAL TimeZone = 'GMT';
SET LOCAL DateStyle = 'ISO, MDY';
SET LOCAL IntervalStyle = 'postgres';
SET LOCAL bytea_output = 'hex';
SET LOCAL jit = off;
SET LOCAL synchronous_commit = off;
SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = {statement_timeout};
SET LOCAL idle_in_transaction_session_timeout = '60s'{unlimited}

-- name: more_memory
SET LOCAL work_mem = {work_memory}

-- name: hold
-- The lock of a job until the end of the transaction, which holds across hosts and behind a transaction pooler; no row
-- comes back if another session has it.
SELECT job FROM {schema}.state WHERE job = %(job)s FOR UPDATE SKIP LOCKED

-- name: hold_for_few
-- The same; what the job has seen, and whether the table may hold anything of the buckets that are to be computed.
SELECT notes_seen::text AS notes_seen, {occupied} AS occupied
FROM {schema}.state
WHERE job = %(job)s
FOR UPDATE SKIP LOCKED

-- name: occupied
-- In this form an index is used also by a planner that takes the table to be small: a part of `hold_for_few` and `take`.
(
    SELECT bucket FROM {target} WHERE bucket >= to_timestamp({low}) AND bucket <= to_timestamp({high})
    ORDER BY bucket LIMIT 1
) IS NOT NULL

-- name: hold_for_workers
-- A lock of the job that lets sessions in that say they belong to it.
SELECT job FROM {schema}.state WHERE job = %(job)s FOR NO KEY UPDATE SKIP LOCKED

-- name: join_holder
-- The lock of a session that works for the holder; while it has it, nobody else can hold the job.
SELECT job FROM {schema}.state WHERE job = %(job)s FOR KEY SHARE SKIP LOCKED

-- name: claim_history
-- The right to queue the history, for one session at a time.
UPDATE {schema}.rollup
SET history_queued_at = now()
WHERE rollup = (
    SELECT rollup FROM {schema}.rollup
    WHERE rollup = %(rollup)s AND history_queued_at IS NULL
    FOR UPDATE SKIP LOCKED
)
RETURNING rollup

-- name: history_size
-- What there is to queue: rows, buckets from the first to the last, and the tables they are in.
WITH RECURSIVE tree AS (
    SELECT %(oid)s::oid AS oid
    UNION
    SELECT inhrelid FROM pg_inherits JOIN tree ON tree.oid = inhparent
)
SELECT
    sum(greatest(class.reltuples, 0))::float8 AS rows,
    count(*) AS tables,
    coalesce((
        SELECT extract(epoch FROM max({time}) - min({time})) / %(seconds)s FROM {source}
        WHERE {time} > '-infinity' AND {time} < 'infinity'
    ), 0)::float8 AS buckets
FROM tree
JOIN pg_class AS class ON class.oid = tree.oid

-- name: queue_history
-- Every bucket of the source, by reading all of it.
INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket)
SELECT DISTINCT %(rollup)s, %(grain)s, {bucket}
FROM {source}
WHERE isfinite({time}) AND {time} >= {floor} AND {bucket} >= {floor}

-- name: queue_dense_history
-- The same by jumping from bucket to bucket in an index on the time. The source may have a column `bucket` of its own.
WITH RECURSIVE found AS (
    (
        SELECT {bucket} AS bucket FROM {source}
        WHERE {time} > '-infinity' AND {time} >= {floor} AND {time} < 'infinity' ORDER BY {time} LIMIT 1
    )
    UNION ALL
    SELECT (
        SELECT {bucket} FROM {source} WHERE {time} >= {next_found} AND {time} < 'infinity' ORDER BY {time} LIMIT 1
    )
    FROM found
    WHERE found.bucket IS NOT NULL
)
INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket)
SELECT %(rollup)s, %(grain)s, bucket FROM found WHERE bucket >= {floor}

-- name: queue_target
-- Every bucket of the table, for a mark that stands for all of them.
WITH queued AS (
    INSERT INTO {schema}.queued_bucket (rollup, grain, bucket)
    SELECT DISTINCT %(rollup)s, %(grain)s, bucket FROM {target} WHERE bucket >= {floor}
    ON CONFLICT DO NOTHING
    RETURNING bucket
)
UPDATE {schema}.state
SET queued_from = least(queued_from, (SELECT min(bucket) FROM queued))
WHERE job = %(job)s

-- name: queue_range
-- Every bucket between two instants that exists in what the table is built from, or in the table.
WITH span AS MATERIALIZED (
    SELECT {first} AS low, {last} AS high
), queued AS (
    INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket)
    SELECT %(rollup)s, %(grain)s, {bucket}
    FROM {source}
    WHERE {time} >= (SELECT low FROM span) AND {time} < (SELECT high FROM span) AND {bucket} >= {floor}
    UNION
    SELECT %(rollup)s, %(grain)s, bucket FROM {target}
    WHERE bucket >= (SELECT low FROM span) AND bucket < (SELECT high FROM span) AND bucket >= {floor}
    RETURNING bucket
)
SELECT count(*) AS buckets FROM queued

-- name: looked_until
-- How far the last tick has looked; at first, when the history was queued: a part of `look_back`.
(
    SELECT coalesce(state.aggregated_until, registered.history_queued_at)
    FROM {schema}.state AS state
    CROSS JOIN {schema}.rollup AS registered
    WHERE state.job = %(job)s AND registered.rollup = %(rollup)s
)

-- name: look_back
-- Every closed bucket from one on that exists in the source, or in the table, because its rows may be gone.
WITH span AS MATERIALIZED (
    SELECT {first} AS low, {open} AS high
), found AS MATERIALIZED (
    SELECT {bucket} AS bucket
    FROM {source}
    WHERE {time} >= (SELECT low FROM span) AND {time} < (SELECT high FROM span) AND {bucket} >= {floor}
    UNION
    SELECT bucket FROM {target}
    WHERE bucket >= (SELECT low FROM span) AND bucket < (SELECT high FROM span) AND bucket >= {floor}
), queued AS (
    INSERT INTO {schema}.queued_bucket (rollup, grain, bucket)
    SELECT %(rollup)s, %(grain)s, bucket FROM found
    ON CONFLICT DO NOTHING
)
UPDATE {schema}.state
SET queued_from = least(queued_from, (SELECT min(bucket) FROM found))
WHERE job = %(job)s
RETURNING (SELECT count(*) FROM found) AS buckets

-- name: switch_capture
-- How the changes of a rollup are noticed from now on.
UPDATE {schema}.rollup SET definition = (definition - 'capture') || {capture}::jsonb WHERE rollup = {rollup}

-- name: finish
-- The end of a tick that computed all that was closed. The notes that are gone now are those that `noted` saw.
WITH seen AS (
    DELETE FROM {schema}.dirty_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s
        AND xid >= %(unseen_from)s::xid8 AND pg_visible_in_snapshot(xid, %(snapshot)s::pg_snapshot)
){seen_late}{leaving}{coming}
UPDATE {schema}.state AS state
SET last_started_at = to_timestamp(%(started)s), last_completed_at = clock_timestamp(), last_outcome = 'success',
    aggregated_until = greatest(aggregated_until, to_timestamp(%(until)s)),
    notes_seen = %(snapshot)s::pg_snapshot, notes_seen_in = %(here)s,
    queued_from = {queued_from}
WHERE job = %(job)s

-- name: seen_late
-- A part of `finish`, like the next three, where there are any.
, seen_late AS (
    DELETE FROM {schema}.dirty_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s
        AND xid = ANY (ARRAY({ended_before}))
)

-- name: leaving
-- The closed buckets leave the queue.
, leaving AS (
    DELETE FROM {schema}.queued_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s
        AND bucket = ANY (ARRAY(SELECT to_timestamp(second) FROM unnest(%(closed)s::bigint[]) AS second))
)

-- name: coming
-- Those that are still open come into it.
, coming AS (
    INSERT INTO {schema}.queued_bucket (rollup, grain, bucket)
    SELECT %(rollup)s, %(grain)s, to_timestamp(second) FROM unnest(%(later)s::bigint[]) AS second
    ON CONFLICT DO NOTHING
)

-- name: staying
-- The first that stays in it, whatever else came into it since the look.
(
    SELECT bucket FROM {schema}.queued_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s AND bucket >= state.queued_from
        AND bucket <> ALL (ARRAY(SELECT to_timestamp(second) FROM unnest(%(closed)s::bigint[]) AS second))
    ORDER BY bucket LIMIT 1
)

-- name: sort_in
-- The unseen notes become entries of the queue, one for each bucket, and are seen. All of this is one statement, so the
-- notes that it takes are those that its snapshot shows.
WITH taken AS (
    DELETE FROM {schema}.dirty_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s AND xid >= %(unseen_from)s::xid8
    RETURNING bucket
), taken_late AS (
    DELETE FROM {schema}.dirty_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s AND xid = ANY (ARRAY({ended}))
    RETURNING bucket
), dirty AS MATERIALIZED (
    SELECT bucket FROM taken UNION SELECT bucket FROM taken_late
), queued AS (
    INSERT INTO {schema}.queued_bucket (rollup, grain, bucket)
    SELECT %(rollup)s, %(grain)s, bucket FROM dirty WHERE bucket > '-infinity' AND bucket >= {floor}
    ON CONFLICT DO NOTHING
    RETURNING bucket
){expired}
UPDATE {schema}.state
SET last_started_at = to_timestamp(%(started)s),
    notes_seen = pg_current_snapshot(),
    notes_seen_in = %(here)s,
    queued_from = least(queued_from, (SELECT min(bucket) FROM queued))
WHERE job = %(job)s
RETURNING EXISTS (SELECT FROM dirty WHERE bucket = '-infinity') AS marked, {too_old} AS too_old

-- name: expired
-- Buckets whose source rows may be gone never come into the queue, and leave it if they waited too long: a part of
-- `sort_in`.
, expired AS (
    DELETE FROM {schema}.queued_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s
        AND bucket >= (SELECT queued_from FROM {schema}.state WHERE job = %(job)s) AND bucket < {floor}
    RETURNING bucket
)

-- name: too_old
-- What they were: a part of `sort_in`.
ARRAY(
    SELECT extract(epoch FROM bucket)::bigint FROM dirty WHERE bucket > '-infinity' AND bucket < {floor}
    UNION
    SELECT extract(epoch FROM bucket)::bigint FROM expired
)

-- name: late_by_index
-- Which buckets the source still holds rows of: the others were purged. One range of an index for each.
SELECT
    count(*) AS buckets,
    to_char(min(batchctl_low) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS first,
    to_char(max(batchctl_low) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS last
FROM (
    SELECT bucket AS batchctl_low, {next} AS batchctl_high
    FROM (SELECT to_timestamp(second) AS bucket FROM unnest(%(buckets)s::bigint[]) AS second) AS listed
) AS batchctl_range
WHERE EXISTS (
    SELECT FROM {source}
    WHERE {time} >= batchctl_range.batchctl_low AND {time} < batchctl_range.batchctl_high{where}
)

-- name: late_by_scan
-- The same where no index helps, by reading the source once.
SELECT
    count(*) AS buckets,
    to_char(min(bucket) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS first,
    to_char(max(bucket) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS last
FROM (
    SELECT DISTINCT {bucket} AS bucket FROM {source}
    WHERE isfinite({time}) AND {time} < {floor}
        AND {bucket} IN (SELECT to_timestamp(second) FROM unnest(%(buckets)s::bigint[]) AS second){where}
) AS held

-- name: count_ignored
UPDATE {schema}.state SET ignored_buckets = ignored_buckets + %(buckets)s WHERE job = %(job)s

-- name: pick
-- The newest closed buckets in the queue.
SELECT
    extract(epoch FROM min(bucket))::bigint AS low, extract(epoch FROM max(bucket))::bigint AS high,
    count(*) AS buckets
FROM (
    SELECT bucket FROM {schema}.queued_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s
        AND bucket >= (SELECT queued_from FROM {schema}.state WHERE job = %(job)s)
        AND bucket >= {floor} AND bucket < least({open}, coalesce(to_timestamp(%(below)s::float8), 'infinity'))
    ORDER BY bucket DESC
    LIMIT %(limit)s
) AS newest

-- name: keep_definition
-- The rollup, unless it was changed; nobody changes it until the end of the transaction.
SELECT rollup FROM {schema}.rollup
WHERE rollup = %(rollup)s AND definition - 'places' = %(definition)s::jsonb
FOR SHARE

-- name: take
-- The buckets of a range, out of the queue, and whether the table holds anything there. What became too old since it was
-- picked stays for the next tick to sort out. None if the rollup was changed since the tick began: its tables are no
-- longer those that this tick knows, and the queue is for the new ones.
WITH taken AS (
    DELETE FROM {schema}.queued_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s
        AND bucket >= to_timestamp(%(low)s) AND bucket <= to_timestamp(%(high)s) AND bucket >= {floor}
        AND EXISTS (
            SELECT FROM {schema}.rollup
            WHERE rollup = %(rollup)s AND definition - 'places' = %(definition)s::jsonb
        )
    RETURNING bucket
)
SELECT
    extract(epoch FROM bucket)::bigint AS start, extract(epoch FROM {next})::bigint AS end,
    to_char(bucket AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS shown,
    {occupied} AS occupied
FROM taken
ORDER BY bucket

-- name: remaining
-- Closed buckets that wait, in the queue or as notes.
SELECT count(*) AS buckets
FROM (
    SELECT bucket FROM {schema}.dirty_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s AND bucket > '-infinity' AND bucket < {open}
    UNION
    SELECT bucket FROM {schema}.queued_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s AND bucket < {open}
) AS waiting

-- name: settle
-- The end of a tick, and what it leaves in the queue.
UPDATE {schema}.state AS state
SET last_completed_at = clock_timestamp(), last_outcome = %(outcome)s,
    aggregated_until = greatest(state.aggregated_until, to_timestamp(%(until)s)),
    queued_from = (
        SELECT min(bucket) FROM {schema}.queued_bucket
        WHERE rollup = %(rollup)s AND grain = %(grain)s AND bucket >= state.queued_from
    )
WHERE job = %(job)s
RETURNING (
    SELECT count(*) FROM {schema}.queued_bucket
    WHERE rollup = %(rollup)s AND grain = %(grain)s AND bucket >= queued_from AND bucket < {open}
) AS remaining

-- name: end
-- The end of a tick that could not hold the job, unless somebody still holds it, who will record an end too.
UPDATE {schema}.state
SET last_completed_at = clock_timestamp(), last_outcome = %(outcome)s
WHERE job = (SELECT job FROM {schema}.state WHERE job = %(job)s FOR UPDATE SKIP LOCKED)

-- name: failed
-- A tick that was refused, or that ended before it came to anything.
UPDATE {schema}.state
SET last_started_at = now(), last_completed_at = clock_timestamp(), last_outcome = 'failed'
WHERE job = (SELECT job FROM {schema}.state WHERE job = %(job)s FOR UPDATE SKIP LOCKED)

-- name: read_range
-- The groups of neighbouring buckets.
SELECT
    {bucket}{dimensions}, {values}, count(*)
FROM {source}
WHERE {time} >= to_timestamp(%(low)s) AND {time} < to_timestamp(%(high)s){where}
GROUP BY {groups}

-- name: read_ranges
-- The groups of buckets that lie apart: one range of an index for each stretch of neighbours.
SELECT batchctl_group.*
FROM unnest(%(lows)s::bigint[], %(highs)s::bigint[]) AS batchctl_range (batchctl_low, batchctl_high)
CROSS JOIN LATERAL (
    SELECT
        {bucket}{dimensions}, {values}, count(*)
    FROM {source}
    WHERE {time} >= to_timestamp(batchctl_range.batchctl_low)
        AND {time} < to_timestamp(batchctl_range.batchctl_high){where}
    GROUP BY {groups}
) AS batchctl_group

-- name: stored_types
-- The types and collations of a table's columns, as the session spells them.
SELECT
    attname AS name,
    format_type(atttypid, atttypmod)
        || CASE WHEN collname IS NULL THEN '' ELSE format(' COLLATE %%I.%%I', nspname, collname) END AS type
FROM pg_attribute
LEFT JOIN pg_collation ON pg_collation.oid = attcollation
LEFT JOIN pg_namespace ON pg_namespace.oid = collnamespace
WHERE attrelid = to_regclass(%(table)s) AND attnum > 0 AND NOT attisdropped

-- name: refresh
-- Replaces buckets: writes the rows that differ, deletes the groups that are gone, marks the parents of both.
-- What both sides have is there twice, so grouping by everything finds what one of them has alone. It takes NULL for equal
-- to NULL, needs no more than one pass over each side whatever the planner expects, and what stays as it is is not even
-- locked. Both have the types of the table, because those of the source may have been changed since it was made.
WITH fresh ({columns}, {rows}) AS MATERIALIZED (
    SELECT {typed}, {rows}
    FROM (
        {read}
    ) AS batchctl_read ({columns}, {rows})
), differing AS MATERIALIZED (
    SELECT {found}, min({row}) AS {row}
    FROM (
        SELECT {columns}{derived}{kept}, ctid FROM {target}
        WHERE bucket = ANY (ARRAY(SELECT to_timestamp(second) FROM unnest(%(buckets)s::bigint[]) AS second))
        UNION ALL
        SELECT {columns}{derivations}{kept}, NULL FROM fresh
    ) AS both_sides ({columns}{derived}{compared}, {row})
    GROUP BY {told_apart}
    HAVING count(*) = 1
), written AS (
    INSERT INTO {target} AS kept ({columns}{derived})
    SELECT {columns}{derived} FROM differing WHERE {row} IS NULL ORDER BY {order}
    ON CONFLICT ON CONSTRAINT {constraint} DO UPDATE SET {assignments}
    RETURNING kept.bucket
), gone AS (
    SELECT min({row}) AS {row} FROM differing GROUP BY {key} HAVING count(*) = count({row})
), removed AS (
    DELETE FROM {target} WHERE ctid = ANY (ARRAY(SELECT {row} FROM gone)) RETURNING bucket
), changed AS (
    SELECT bucket FROM written UNION SELECT bucket FROM removed
){marks}
SELECT
    (SELECT count(*) FROM written) AS rows_written,
    (SELECT count(*) FROM removed) AS rows_deleted,
    sum(fresh.{rows}) AS source_rows,
    sum(fresh.{events}) AS events
FROM fresh

-- name: fill
-- The same where the table holds nothing yet: there is nothing to compare with, and the order of the key is the quickest.
WITH fresh ({columns}, {rows}) AS MATERIALIZED (
    {read}
), written AS (
    INSERT INTO {target} ({columns}{derived})
    SELECT {columns}{derivations} FROM fresh ORDER BY {order}
), changed AS (
    {changed}
){marks}
SELECT
    count(*) AS rows_written,
    0 AS rows_deleted,
    sum(fresh.{rows}) AS source_rows,
    sum(fresh.{events}) AS events
FROM fresh

-- name: mark
-- The parents of buckets that changed, in one coarser grain: a part of `refresh` and `fill`.
, {name} AS (
    INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket)
    SELECT %(rollup)s, {grain}, bucket FROM (SELECT DISTINCT {bucket} AS bucket FROM changed) AS parent
)

-- name: registered
-- What was migrated.
SELECT rollup, definition - 'places' AS definition, definition -> 'places' AS places
FROM {schema}.rollup
ORDER BY rollup

-- name: find_table
-- A table by the name that the configuration gives it, and whether triggers on it would see everything.
SELECT
    class.oid::bigint AS oid, namespace.nspname AS schema, class.relname AS name, class.relkind::text AS kind,
    (SELECT inhparent::regclass::text FROM pg_inherits WHERE inhrelid = class.oid LIMIT 1) AS parent,
    EXISTS (SELECT FROM pg_subscription_rel WHERE srrelid = class.oid) AS subscribed,
    row_security_active(class.oid) AS filtered
FROM pg_class AS class
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
WHERE class.oid = to_regclass(%(table)s)

-- name: early_bins
-- False on a server (before 15.7) that puts a time before 2000, at the very start of a bucket, into the one before it.
SELECT date_bin('1 hour', '1999-12-31 23:00:00+00', '2000-01-01 00:00:00+00') = '1999-12-31 23:00:00+00' AS correct

-- name: table_columns
-- The columns of a table and their types, as a new table would spell them.
SELECT
    attribute.attname AS name,
    attribute.atttypid = 'timestamptz'::regtype AS instant,
    attribute.attgenerated = 'v' AS virtual,
    attribute.attcollation = 'pg_catalog."default"'::regcollation AS plain,
    format_type(attribute.atttypid, attribute.atttypmod)
        || CASE
            WHEN attribute.attcollation <> type.typcollation
                THEN (
                    SELECT format(' COLLATE %%I.%%I', namespace.nspname, collname)
                    FROM pg_collation
                    JOIN pg_namespace AS namespace ON namespace.oid = collnamespace
                    WHERE pg_collation.oid = attribute.attcollation
                )
            ELSE ''
        END AS type,
    EXISTS (
        SELECT FROM pg_index
        WHERE indrelid = attribute.attrelid AND indkey[0] = attribute.attnum AND indisvalid AND indpred IS NULL
    ) AS indexed
FROM pg_attribute AS attribute
JOIN pg_type AS type ON type.oid = attribute.atttypid
WHERE attribute.attrelid = %(oid)s AND attribute.attnum > 0 AND NOT attribute.attisdropped
ORDER BY attribute.attnum

-- name: table_tree
-- A table and all tables whose rows are read through it, partitions of partitions too.
WITH RECURSIVE tree AS (
    SELECT %(oid)s::oid AS oid
    UNION
    SELECT inhrelid FROM pg_inherits JOIN tree ON tree.oid = inhparent
)
SELECT tree.oid::bigint AS oid, namespace.nspname AS schema, class.relname AS name, class.relkind::text AS kind
FROM tree
JOIN pg_class AS class ON class.oid = tree.oid
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
ORDER BY tree.oid <> %(oid)s::oid, namespace.nspname, class.relname

-- name: known_zone
-- Whether the server has a time zone of that name.
SELECT EXISTS (SELECT FROM pg_timezone_names WHERE name = %(zone)s) AS known

-- name: parse_name
-- A name split as PostgreSQL reads it: unquoted parts in small letters.
SELECT parse_ident(%(text)s) AS parts

-- name: name_taken
-- What exists under a name.
SELECT
    EXISTS (SELECT FROM pg_namespace WHERE nspname = %(schema_name)s) AS schema,
    (SELECT has_schema_privilege(oid, 'CREATE') FROM pg_namespace WHERE nspname = %(schema_name)s) AS writable,
    EXISTS (
        SELECT FROM pg_class JOIN pg_namespace AS namespace ON namespace.oid = relnamespace
        WHERE relname = %(table)s AND nspname = %(schema_name)s
    ) AS relation

-- name: find_function
-- The text of a function of ours.
SELECT prosrc AS body
FROM pg_proc JOIN pg_namespace AS namespace ON namespace.oid = pronamespace
WHERE proname = %(function)s AND nspname = %(schema_name)s

-- name: find_triggers
-- The triggers that call a function of ours.
SELECT
    namespace.nspname AS schema, class.relname AS table, tgname AS trigger, tgenabled IN ('O', 'A') AS enabled
FROM pg_trigger
JOIN pg_proc ON pg_proc.oid = tgfoid
JOIN pg_namespace AS home ON home.oid = pronamespace
JOIN pg_class AS class ON class.oid = tgrelid
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
WHERE proname = %(function)s AND home.nspname = %(schema_name)s
ORDER BY namespace.nspname, class.relname, tgname

-- name: try_where
-- Compiles the filter, without reading a row.
SELECT count(*) FROM {source} WHERE false{where}

-- name: measure_type
-- Compiles an aggregate and reads its type as a new table would spell it, without reading a row. Another collation than
-- the type's own has to be kept, or the coarser grains would compare by another order.
SELECT
    format_type(type.oid, -1)
        || CASE
            WHEN type.typcollation <> 0
                THEN coalesce(
                    (
                        SELECT format(' COLLATE %%I.%%I', namespace.nspname, collname)
                        FROM pg_collation
                        JOIN pg_namespace AS namespace ON namespace.oid = collnamespace
                        WHERE pg_collation.oid = to_regcollation(pg_collation_for(compiled.value))
                            AND pg_collation.oid <> type.typcollation
                    ),
                    ''
                )
            ELSE ''
        END AS type
FROM (SELECT {call} AS value FROM {source} WHERE false) AS compiled
JOIN pg_type AS type ON type.oid = pg_typeof(compiled.value)

-- name: group_rows
-- Compiles the grouping, without reading a row.
SELECT 1 FROM {source} WHERE false GROUP BY {columns} ORDER BY {columns}

-- name: capture_body
-- Body of the trigger function: appends the buckets that a statement touched, in the writer's own transaction.
-- The time column may be called like a variable of the language (new, found), hence our own long names.
#variable_conflict use_column
DECLARE
    batchctl_touched bigint;
BEGIN
    IF TG_OP = 'INSERT' THEN
        -- One row is the common case, and telling buckets apart would cost as much as noting one.
        INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket, xid)
        SELECT {rollup}::text, {grain}::text, {bucket}, pg_current_xact_id()
        FROM new_rows
        WHERE isfinite({time})
        LIMIT 2;
        GET DIAGNOSTICS batchctl_touched = ROW_COUNT;
        IF batchctl_touched = 2 THEN
            -- Rows that come together are mostly of one bucket, which is noted now. This ends at the first of another. It is
            -- a condition of its own, because one with a query in it is run as a query even where the rest is false.
            IF EXISTS (
                SELECT FROM new_rows
                WHERE {bucket} <> (SELECT {bucket} FROM new_rows WHERE isfinite({time}) LIMIT 1)
            ) THEN
                -- A session keeps the plan that it makes first. That for few rows sorts them, which many take twice as long
                -- for as for hashing, so many have a statement of their own.
                IF EXISTS (SELECT FROM new_rows OFFSET 1000) THEN
                    INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket)
                    {touched};
                ELSE
                    INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket)
                    {touched};
                END IF;
            END IF;
        END IF;
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket)
        SELECT {rollup}, {grain}, touched.bucket
        FROM (
            SELECT {bucket} AS bucket FROM old_rows WHERE isfinite({time})
            UNION
            SELECT {bucket} FROM new_rows WHERE isfinite({time})
        ) AS touched;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket)
        SELECT {rollup}, {grain}, touched.bucket
        FROM (SELECT DISTINCT {bucket} AS bucket FROM old_rows WHERE isfinite({time})) AS touched;
    ELSE
        INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket) VALUES ({rollup}, {grain}, '-infinity');
    END IF;
    RETURN NULL;
END

-- name: touched
-- The buckets of rows that were inserted: a part of `capture_body`. A bucket is infinite if its times are; asking for that
-- at the end, behind OFFSET 0, asks it of buckets and not of rows.
SELECT {rollup}, {grain}, touched.bucket
FROM (SELECT DISTINCT {bucket} AS bucket FROM new_rows OFFSET 0) AS touched
WHERE isfinite(touched.bucket)

-- name: create_function
-- Runs with its owner's rights, so that the application's role needs none here, on a path that nobody else can write.
CREATE OR REPLACE FUNCTION {schema}.{function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS {body}

-- name: close_function
-- A trigger fires without this right; with it anybody could fill the queue.
REVOKE ALL ON FUNCTION {schema}.{function}() FROM PUBLIC

-- name: create_trigger_insert
CREATE OR REPLACE TRIGGER {trigger} AFTER INSERT ON {table}
REFERENCING NEW TABLE AS new_rows
FOR EACH STATEMENT EXECUTE FUNCTION {schema}.{function}()

-- name: create_trigger_update
CREATE OR REPLACE TRIGGER {trigger} AFTER UPDATE ON {table}
REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
FOR EACH STATEMENT EXECUTE FUNCTION {schema}.{function}()

-- name: create_trigger_delete
CREATE OR REPLACE TRIGGER {trigger} AFTER DELETE ON {table}
REFERENCING OLD TABLE AS old_rows
FOR EACH STATEMENT EXECUTE FUNCTION {schema}.{function}()

-- name: create_trigger_truncate
CREATE OR REPLACE TRIGGER {trigger} AFTER TRUNCATE ON {table}
FOR EACH STATEMENT EXECUTE FUNCTION {schema}.{function}()

-- name: find_strange_triggers
-- Triggers of a table that do not call a function of ours.
SELECT tgname AS trigger
FROM pg_trigger
JOIN pg_proc ON pg_proc.oid = tgfoid
JOIN pg_namespace AS home ON home.oid = pronamespace
JOIN pg_class AS class ON class.oid = tgrelid
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
WHERE namespace.nspname = %(table_schema)s AND class.relname = %(table)s
    AND (proname, home.nspname) <> (%(function)s, %(schema_name)s)

-- name: drop_trigger
DROP TRIGGER IF EXISTS {trigger} ON {table}

-- name: create_target
-- A row for each group of a bucket; NULL is a group like any other.
CREATE TABLE {target} (
    {columns},
    CONSTRAINT {constraint} UNIQUE NULLS NOT DISTINCT ({key})
)

-- name: identify_target
-- A publication of all tables would otherwise refuse every change here. The key will not do, its columns may be NULL.
ALTER TABLE {target} REPLICA IDENTITY FULL

-- name: comment_table
COMMENT ON TABLE {table} IS {text}

-- name: comment_column
COMMENT ON COLUMN {table}.{column} IS {text}

-- name: register
-- In the transaction that makes the tables, so that they are known as ours. Ticks wait for the triggers.
INSERT INTO {schema}.rollup (rollup, definition) VALUES ({rollup}, {definition})

-- name: allow_ticks
-- The last step: every change is captured, so the history can be queued.
UPDATE {schema}.rollup SET definition = definition - 'unfinished' WHERE rollup = {rollup}

-- name: register_job
INSERT INTO {schema}.state (job) VALUES ({job}) ON CONFLICT DO NOTHING

-- name: forget_history
-- A table that had no triggers may have changed unseen, so everything is queued again: what the source holds, and by the
-- mark also what it no longer does.
WITH forgotten AS (
    UPDATE {schema}.rollup SET history_queued_at = NULL WHERE rollup = {rollup} RETURNING rollup
)
INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket) SELECT rollup, {grain}, '-infinity' FROM forgotten

-- name: refuse_ticks
-- A rollup on its way out no longer fits its configuration, so no tick takes missing triggers for quiet.
UPDATE {schema}.rollup SET definition = definition || '{{"dropping": true}}' WHERE rollup = {rollup}

-- name: drop_function
DROP FUNCTION IF EXISTS {schema}.{function}()

-- name: drop_target
DROP TABLE IF EXISTS {table}

-- name: forget_notes
DELETE FROM {schema}.dirty_bucket WHERE rollup = {rollup}

-- name: forget_queue
DELETE FROM {schema}.queued_bucket WHERE rollup = {rollup}

-- name: forget_partitions
DELETE FROM {schema}.source_partition WHERE rollup = {rollup}

-- name: forget_job
DELETE FROM {schema}.state WHERE job = {job}

-- name: forget_pause
-- A pause of the rollup as a whole; a batch of the same name keeps its state.
DELETE FROM {schema}.state WHERE job = {rollup} AND last_run_id IS NULL

-- name: forget
DELETE FROM {schema}.rollup WHERE rollup = {rollup}

-- name: set_lock_timeout
SET LOCAL lock_timeout = {milliseconds}

-- name: one_migration
-- One `migrate` at a time looks and changes, so that what it finds half made is nobody's work in progress.
SELECT pg_advisory_xact_lock(hashtextextended('batchctl rollups ' || {name}, 0))

-- name: undroppable
-- Why tables cannot be dropped (or, without their targets, lose their triggers): the owner, and what depends on them.
SELECT
    wanted.schema || '.' || wanted.name AS table,
    NOT (
        pg_has_role(class.relowner, 'USAGE') OR (wanted.target AND pg_has_role(namespace.nspowner, 'USAGE'))
    ) AS foreign,
    CASE WHEN wanted.target THEN ARRAY(
        SELECT DISTINCT
            CASE
                WHEN ev_class IS NULL THEN pg_describe_object(classid, objid, 0)
                ELSE pg_describe_object('pg_class'::regclass, ev_class, 0)
            END
        FROM pg_depend
        LEFT JOIN pg_rewrite ON classid = 'pg_rewrite'::regclass AND pg_rewrite.oid = objid
        WHERE deptype = 'n'
            AND (
                (refclassid = 'pg_class'::regclass AND refobjid = class.oid)
                OR (refclassid = 'pg_type'::regclass AND refobjid = class.reltype)
            )
            AND NOT EXISTS (
                SELECT FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS ours (schema, name)
                JOIN pg_namespace ON nspname = ours.schema
                JOIN pg_class ON relname = ours.name AND relnamespace = pg_namespace.oid
                WHERE pg_class.oid = ev_class
            )
        ORDER BY 1
    ) ELSE '{{}}' END AS dependants
FROM unnest(%(schemas)s::text[], %(names)s::text[], %(targets)s::boolean[]) AS wanted (schema, name, target)
JOIN pg_namespace AS namespace ON namespace.nspname = wanted.schema
JOIN pg_class AS class ON class.relname = wanted.name AND class.relnamespace = namespace.oid
ORDER BY 1
