-- Statements about the partitions of a source, which come and go without a trigger noticing.

-- name: tree
-- A source and its partitions of all levels, with what their bounds say of the time, a part of `changes`. Bounds are
-- text, to be read as they were written. A partition that is being detached shows its rows to older snapshots only.
setting AS MATERIALIZED (SELECT set_config('DateStyle', 'ISO', true), set_config('TimeZone', 'UTC', true)),
tree AS (
    SELECT
        to_regclass(%(source)s)::oid AS relation, ''::text AS attached,
        '-infinity'::timestamptz AS low, 'infinity'::timestamptz AS high
    FROM setting
    WHERE to_regclass(%(source)s) IS NOT NULL
    UNION
    SELECT
        inhrelid,
        -- All the way down, because a tree comes and goes as one.
        concat(tree.attached, '/', pg_inherits.xmin),
        greatest(tree.low, bounds[1]::timestamptz),
        -- Only with further columns in the key does a partition hold rows of its upper bound itself.
        least(tree.high, bounds[2]::timestamptz - CASE partnatts WHEN 1 THEN interval '1us' ELSE interval '0' END)
    FROM tree
    JOIN pg_inherits ON inhparent = tree.relation {staying}
    JOIN pg_class AS child ON child.oid = inhrelid
    LEFT JOIN pg_partitioned_table ON partrelid = inhparent AND partstrat = 'r'
    LEFT JOIN pg_attribute AS key ON key.attrelid = inhparent AND key.attnum = partattrs[0] AND key.attname = %(time)s
    CROSS JOIN LATERAL (
        SELECT CASE WHEN key.attname IS NOT NULL THEN ARRAY[
            (regexp_match(pg_get_expr(relpartbound, child.oid), $$^FOR VALUES FROM \('([^']*)'$$))[1],
            (regexp_match(pg_get_expr(relpartbound, child.oid), $$ TO \('([^']*)'$$))[1]
        ] END AS bounds
    ) AS written
)

-- name: staying
AND NOT inhdetachpending

-- name: changes
-- How the partitions differ from those that were remembered, and which of those are not done with.
WITH RECURSIVE {tree}
SELECT
    coalesce(tree.relation, known.relation)::bigint AS relation,
    coalesce(tree.attached, known.attached) AS attached,
    namespace.nspname AS schema, class.relname AS name, class.relkind::text AS kind,
    tree.low::text AS low, tree.high::text AS high,
    tree.relation IS NULL AS gone,
    coalesce(known.tracked, false) AS tracked,
    coalesce(known.queued, false) AS queued
FROM tree
FULL JOIN (SELECT * FROM {schema}.source_partition WHERE rollup = %(rollup)s) AS known
    ON known.relation = tree.relation AND known.attached = tree.attached
        AND known.low = tree.low AND known.high = tree.high
LEFT JOIN pg_class AS class ON class.oid = tree.relation
LEFT JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
WHERE (known.relation IS NULL OR tree.relation IS NULL OR NOT known.tracked OR NOT known.queued)
    -- Without its source a rollup is in error, and not empty.
    AND EXISTS (SELECT FROM tree)
ORDER BY gone DESC, namespace.nspname, class.relname

-- name: queue_gone
-- Forgets partitions that are gone, and notes what the table has of the time they covered.
WITH gone AS (
    DELETE FROM {schema}.source_partition
    WHERE rollup = %(rollup)s
        AND (relation, attached) IN (SELECT * FROM unnest(%(relations)s::oid[], %(attached)s::text[]))
    RETURNING CASE WHEN isfinite(low) THEN {bucket_of_low} ELSE low END AS low, high
), noted AS (
    INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket)
    SELECT DISTINCT %(rollup)s, %(grain)s, kept.bucket
    FROM gone
    JOIN {target} AS kept ON kept.bucket >= gone.low AND kept.bucket <= gone.high
    WHERE kept.bucket >= {floor}
    RETURNING bucket
)
SELECT count(*) AS buckets FROM noted

-- name: queue_new
-- Notes the buckets of a partition, and those that the table has of the time it covers: rows that were read through the
-- parent may have left it again before there were triggers to notice. If its bounds do not say which buckets that are,
-- it is for a partition only that was known before it had triggers.
WITH covered AS MATERIALIZED (
    SELECT %(low)s::timestamptz AS low, %(high)s::timestamptz AS high
), noted AS (
    INSERT INTO {schema}.dirty_bucket (rollup, grain, bucket)
    SELECT %(rollup)s, %(grain)s, {bucket}
    FROM ONLY {partition}
    WHERE isfinite({time}) AND {time} >= {floor} AND {bucket} >= {floor}
    UNION
    SELECT %(rollup)s, %(grain)s, kept.bucket
    FROM covered
    JOIN {target} AS kept
        ON kept.bucket >= CASE WHEN isfinite(covered.low) THEN {bucket_of_low} ELSE covered.low END
        AND kept.bucket <= covered.high
    WHERE kept.bucket >= {floor} AND (%(known)s OR (isfinite(covered.low) AND isfinite(covered.high)))
    RETURNING bucket
)
SELECT count(*) AS buckets FROM noted

-- name: remember
INSERT INTO {schema}.source_partition (rollup, relation, attached, low, high, tracked, queued)
VALUES {rows}
ON CONFLICT (rollup, relation, attached) DO UPDATE
SET low = excluded.low, high = excluded.high, tracked = excluded.tracked, queued = excluded.queued

-- name: strange
-- Whether the source has a partition that is not remembered: little to ask beside what bounds say.
WITH RECURSIVE tree AS (
    SELECT to_regclass(%(source)s)::oid AS relation, ''::text AS attached
    UNION
    SELECT inhrelid, concat(tree.attached, '/', pg_inherits.xmin)
    FROM tree
    JOIN pg_inherits ON inhparent = tree.relation
)
SELECT EXISTS (
    SELECT relation, attached FROM tree
    EXCEPT
    SELECT relation, attached FROM {schema}.source_partition WHERE rollup = %(rollup)s
) AS found

-- name: witness
-- Remembers partitions whose rows may have been counted before a tick has followed them: the next one does.
WITH RECURSIVE {tree}
INSERT INTO {schema}.source_partition (rollup, relation, attached, low, high, tracked, queued)
SELECT %(rollup)s, relation, attached, low, high, false, false FROM tree
ON CONFLICT (rollup, relation, attached) DO NOTHING
