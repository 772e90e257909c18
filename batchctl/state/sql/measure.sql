-- Statements of `rollup/` about what measures need.

-- name: find_extension
-- The schema of an extension, NULL if it is not created; whether it could be; the server's major version.
SELECT
    (
        SELECT nspname FROM pg_extension JOIN pg_namespace AS namespace ON namespace.oid = extnamespace
        WHERE extname = %(extension)s
    ) AS schema,
    EXISTS (SELECT FROM pg_available_extensions WHERE name = %(extension)s) AS available,
    current_setting('server_version_num')::integer / 10000 AS major

-- name: hashable
-- Fails for a type whose values cannot be hashed, without reading a row.
SELECT hash_array_extended(coalesce(array_agg({x}), '{{}}'), 0) AS hash FROM {source} WHERE false
