-- What a grain's table holds, compared with the source group by group. A group is a bucket and its dimensions.
WITH source AS (
    SELECT
        date_bin({width}::interval, occurred_at, 'epoch') AS bucket, event_type, item,
        count(*) AS events, sum(value) AS value_sum, min(value) AS value_min, max(value) AS value_max,
        avg(value) AS value_avg
    FROM public.fact_events
    WHERE occurred_at < {until}
    GROUP BY 1, 2, 3
), kept AS (
    SELECT bucket, event_type, item, events, value_sum, value_min, value_max, value_avg
    FROM {table}
    WHERE bucket < {until}
), compared AS (
    SELECT
        bucket,
        source.events AS source_events, source.value_sum AS source_value,
        kept.events AS kept_events, kept.value_sum AS kept_value,
        (source.events, source.value_sum, source.value_min, source.value_max, round(source.value_avg, 9))
            IS DISTINCT FROM
            (kept.events, kept.value_sum, kept.value_min, kept.value_max, round(kept.value_avg, 9)) AS differs
    FROM source FULL JOIN kept USING (bucket, event_type, item)
)
SELECT
    coalesce(sum(source_events), 0)::bigint AS source_events, coalesce(sum(source_value), 0) AS source_value,
    coalesce(sum(kept_events), 0)::bigint AS kept_events, coalesce(sum(kept_value), 0) AS kept_value,
    count(DISTINCT bucket) AS buckets, count(*) AS groups,
    count(*) FILTER (WHERE differs) AS differing, min(bucket) FILTER (WHERE differs) AS first_differing
FROM compared
