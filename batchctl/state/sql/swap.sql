-- Statements that put the new version of a rollup in the place of the old one.

-- name: is_kept_only_here
-- Whether a table holds what its source need not hold any more, so that it cannot be built anew.
SELECT EXISTS (SELECT FROM {target} WHERE bucket < {floor}) AS kept

-- name: hold_jobs
-- No tick of either version is at work, and none begins.
SELECT job FROM {schema}.state WHERE job = ANY ({jobs}) ORDER BY job FOR UPDATE

-- name: lock_targets
-- Whoever reads the old tables has to end before the source is locked, or its writers would wait for readers.
LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE

-- name: lock_source
-- From here on every writer has ended, so all its notes can be seen, and the next one meets the new trigger function.
LOCK TABLE {source} IN SHARE ROW EXCLUSIVE MODE

-- name: queue_notes
-- What the new version has noted and not seen yet goes into the queue, under the name that stays; so does, after a mark
-- that stands for all of them, every bucket of its table.
INSERT INTO {schema}.queued_bucket (rollup, grain, bucket)
SELECT {rollup}, {grain}, bucket FROM {schema}.dirty_bucket
WHERE rollup = {next} AND grain = {grain} AND bucket > '-infinity'
UNION
SELECT {rollup}, {grain}, bucket FROM {target}
WHERE EXISTS (
    SELECT FROM {schema}.dirty_bucket WHERE rollup = {next} AND grain = {grain} AND bucket = '-infinity'
)
ON CONFLICT DO NOTHING

-- name: rename_queue
-- What the new version still has to compute, under the name that stays.
UPDATE {schema}.queued_bucket SET rollup = {rollup} WHERE rollup = {next}

-- name: rename_partitions
-- What the new version knows of the source's partitions: one that went since is still to be noticed, and one that came
-- since the swap was planned has the triggers of the new version only.
UPDATE {schema}.source_partition
SET rollup = {rollup},
    tracked = tracked AND EXISTS (SELECT FROM unnest({tables}::text[]) AS name WHERE to_regclass(name) = relation)
WHERE rollup = {next}

-- name: take_over_job
-- A job that was there keeps its times and its pause. It has seen no note: those that there were are in the queue.
INSERT INTO {schema}.state AS kept (job, queued_from, aggregated_until)
SELECT
    {job},
    (SELECT min(bucket) FROM {schema}.queued_bucket WHERE rollup = {rollup} AND grain = {grain}),
    (SELECT aggregated_until FROM {schema}.state WHERE job = {next_job})
ON CONFLICT (job) DO UPDATE
SET queued_from = excluded.queued_from, aggregated_until = excluded.aggregated_until,
    notes_seen = NULL, notes_seen_in = NULL

-- name: rename_table
ALTER TABLE {table} RENAME TO {name}

-- name: rename_constraint
-- And with it its index.
ALTER TABLE {table} RENAME CONSTRAINT {constraint} TO {name}

-- name: rename_not_null
-- From PostgreSQL 18 on, "not null" has a name as well.
DO {body}

-- name: not_null_body
BEGIN
    IF EXISTS (
        SELECT FROM pg_constraint WHERE conrelid = {relation}::regclass AND conname = {old} AND contype = 'n'
    ) THEN
        ALTER TABLE {table} RENAME CONSTRAINT {constraint} TO {name};
    END IF;
END

-- name: replace
-- The rollup is now what its new version was.
UPDATE {schema}.rollup AS kept
SET definition = {definition}, migrated_at = now(), history_queued_at = made.history_queued_at
FROM {schema}.rollup AS made
WHERE kept.rollup = {rollup} AND made.rollup = {next}

-- name: relation_grants
-- The rights on a table or view, and on its columns, that somebody other than its owner has.
SELECT NULL AS column, granted.privilege_type AS privilege, granted.is_grantable AS grantable,
    CASE WHEN granted.grantee <> 0 THEN pg_get_userbyid(granted.grantee) END AS role
FROM pg_class AS class
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
CROSS JOIN LATERAL aclexplode(class.relacl) AS granted
WHERE namespace.nspname = %(schema_name)s AND class.relname = %(table)s AND granted.grantee <> class.relowner
UNION ALL
SELECT attribute.attname, granted.privilege_type, granted.is_grantable,
    CASE WHEN granted.grantee <> 0 THEN pg_get_userbyid(granted.grantee) END
FROM pg_class AS class
JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
JOIN pg_attribute AS attribute ON attribute.attrelid = class.oid AND NOT attribute.attisdropped
CROSS JOIN LATERAL aclexplode(attribute.attacl) AS granted
WHERE namespace.nspname = %(schema_name)s AND class.relname = %(table)s AND granted.grantee <> class.relowner
ORDER BY 1, 2, 4

-- name: function_grants
-- The same of a function of ours.
SELECT NULL AS column, granted.privilege_type AS privilege, granted.is_grantable AS grantable,
    CASE WHEN granted.grantee <> 0 THEN pg_get_userbyid(granted.grantee) END AS role
FROM pg_proc
JOIN pg_namespace AS namespace ON namespace.oid = pronamespace
CROSS JOIN LATERAL aclexplode(proacl) AS granted
WHERE namespace.nspname = %(schema_name)s AND proname = %(function)s AND granted.grantee <> proowner
ORDER BY 2, 4

-- name: grant
GRANT {privilege}{columns} ON {what} TO {role}{option}
