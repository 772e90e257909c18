-- Statements of `doctor/`: what a server is, what the role may, what waits. They only read.

-- name: server
-- The server, its clock and the role's settings.
SELECT
    current_setting('server_version_num')::integer AS number,
    split_part(current_setting('server_version'), ' ', 1) AS version,
    pg_is_in_recovery() AS standby,
    clock_timestamp() AS now,
    current_user::text AS role

-- name: rights
-- What the role may not do and has to: make the schema, or use it and every table in it.
SELECT
    home.oid IS NOT NULL AS made,
    has_database_privilege(current_database(), 'CREATE') AS may_make,
    coalesce(has_schema_privilege(home.oid, 'USAGE'), false) AS may_use,
    ARRAY(
        SELECT relname::text FROM pg_class
        WHERE relnamespace = home.oid AND relkind = 'r'
            AND NOT (
                has_table_privilege(pg_class.oid, 'SELECT') AND has_table_privilege(pg_class.oid, 'INSERT')
                AND has_table_privilege(pg_class.oid, 'UPDATE') AND has_table_privilege(pg_class.oid, 'DELETE')
            )
        ORDER BY relname
    ) AS closed
FROM (SELECT to_regnamespace(quote_ident(%(schema_name)s))) AS home (oid)

-- name: silenced
-- Roles and databases whose sessions fire no ordinary trigger.
SELECT coalesce(rolname::text, 'every role') AS role, coalesce(datname::text, 'every database') AS database
FROM pg_db_role_setting
CROSS JOIN unnest(setconfig) AS setting
LEFT JOIN pg_roles ON pg_roles.oid = setrole
LEFT JOIN pg_database ON pg_database.oid = setdatabase
WHERE setting = 'session_replication_role=replica' AND (setdatabase = 0 OR datname = current_database())
ORDER BY 1, 2

-- name: registered
-- Rollups in the database, and since when; not a new version that is being built beside the one in use.
SELECT rollup, migrated_at, history_queued_at FROM {schema}.rollup WHERE rollup NOT LIKE '%%~next' ORDER BY rollup

-- name: waiting
-- Closed buckets that wait, and the oldest of them.
SELECT
    count(DISTINCT bucket) AS buckets,
    to_char(min(bucket) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') AS oldest
FROM (
    SELECT rollup, grain, bucket FROM {schema}.dirty_bucket WHERE bucket > '-infinity'
    UNION ALL
    SELECT rollup, grain, bucket FROM {schema}.queued_bucket
) AS waiting
WHERE rollup = %(rollup)s AND grain = %(grain)s AND bucket <= now() - make_interval(secs => %(closed_after)s)
