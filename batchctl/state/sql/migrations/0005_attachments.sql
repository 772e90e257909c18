-- A partition that goes and comes back between two looks is told apart from one that stayed.

ALTER TABLE {schema}.source_partition
    ADD COLUMN attached text NOT NULL DEFAULT '',
    DROP CONSTRAINT source_partition_pkey,
    ADD PRIMARY KEY (rollup, relation, attached);
UPDATE {schema}.source_partition
SET attached = coalesce((SELECT min(concat('/', pg_inherits.xmin)) FROM pg_inherits WHERE inhrelid = relation), '');
COMMENT ON TABLE  {schema}.source_partition          IS 'A partitioned source and its partitions of all levels, as ticks found them.';
COMMENT ON COLUMN {schema}.source_partition.attached IS 'Transactions that attached it and what it is in, others each time; empty for the source.';
COMMENT ON TABLE  {schema}.dirty_bucket              IS 'Notes of buckets whose source changed, as triggers append them; a tick deletes them, or sorts them into queued_bucket.';
COMMENT ON COLUMN {schema}.state.notes_seen          IS 'Of a grain: with every note that this snapshot shows a tick is done.';
