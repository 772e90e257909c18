-- Statements about the views beside the tables of rollups.

-- name: find_view
-- What exists under the name of a view, and what is said of it.
SELECT class.relkind::text AS kind, obj_description(class.oid, 'pg_class') AS comment
FROM pg_class AS class JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
WHERE class.relname = %(view)s AND namespace.nspname = %(schema_name)s

-- name: find_path
-- Where the operator's expressions find functions and types, as they do in this session.
SELECT ARRAY['pg_catalog'::name] || array_remove(current_schemas(false), 'pg_catalog') || 'pg_temp'::name AS path

-- name: create_values
CREATE OR REPLACE VIEW {view} AS
SELECT {columns} FROM {target}

-- name: create_live
-- A bucket is in the table or in the function, by one limit that both read in one snapshot.
CREATE OR REPLACE VIEW {view} AS
SELECT {columns} FROM {target} WHERE bucket < {until}
UNION ALL
SELECT {computed} FROM {schema}.{function}() AS open_buckets

-- name: create_function
-- A function rather than a part of the view: what a view reads can neither be dropped nor get another type, and the
-- source is the application's. It computes under the settings that a refresh has, and reads in its caller's snapshot.
CREATE OR REPLACE FUNCTION {schema}.{function}() RETURNS TABLE ({columns})
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = {path} SET "TimeZone" = 'UTC' SET "DateStyle" = 'ISO, MDY' SET "IntervalStyle" = 'postgres'
SET bytea_output = 'hex' SET extra_float_digits = 1 SET row_security = off SET jit = off
AS {body}

-- name: close_function
-- It reads the source with its owner's rights, so who may call it is the owner's to say.
REVOKE ALL ON FUNCTION {schema}.{function}() FROM PUBLIC

-- name: live_body
SELECT {key}, {values}
FROM ({open_rows}) AS open_rows ({key}, {parts})

-- name: open_rows
-- Groups of the source that the finest table does not have yet: a part of `live_body`.
SELECT {bucket}{dimensions}, {values}
FROM {source}
WHERE {time} >= {until} AND isfinite({time}){where}
GROUP BY {positions}

-- name: open_rows_of_finer
-- Groups that a coarser table does not have yet: a part of `live_body`.
SELECT {bucket}{dimensions}, {values}
FROM (
    SELECT {columns} FROM {source} WHERE bucket >= {until} AND bucket < {finer_until}
    UNION ALL
    {open_rows}
) AS finer_rows ({columns})
GROUP BY {positions}

-- name: aggregated_until
-- The end of the buckets that a job has aggregated; a part of `create_live` and `live_body`.
coalesce((SELECT aggregated_until FROM {schema}.state WHERE job = {job}), '-infinity')

-- name: until
-- Where the table of a grain ends, in one value that an index can be searched with; a part of the same.
(
    SELECT CASE WHEN isfinite(reached.instant) THEN {bucket} ELSE reached.instant END
    FROM (SELECT least({ends}) AS instant) AS reached
)

-- name: comment_view
COMMENT ON VIEW {view} IS {text}

-- name: drop_view
DROP VIEW IF EXISTS {view}

-- name: drop_function
DROP FUNCTION IF EXISTS {schema}.{function}()
