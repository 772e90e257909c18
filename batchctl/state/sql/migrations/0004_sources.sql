-- Sources that do not keep their rows for ever, and sources made of partitions that come and go.

ALTER TABLE {schema}.state ADD COLUMN ignored_buckets bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN {schema}.state.ignored_buckets IS 'Of a grain: how many buckets changed below source_retention and were not recomputed, in all.';

CREATE TABLE {schema}.source_partition (
    rollup   text COLLATE "C" NOT NULL,
    relation oid              NOT NULL,
    low      timestamptz      NOT NULL,
    high     timestamptz      NOT NULL,
    tracked  boolean          NOT NULL,
    queued   boolean          NOT NULL,
    PRIMARY KEY (rollup, relation)
);
COMMENT ON TABLE  {schema}.source_partition          IS 'A partitioned source and its partitions of all levels, as the last tick found them.';
COMMENT ON COLUMN {schema}.source_partition.rollup   IS 'The rollup.';
COMMENT ON COLUMN {schema}.source_partition.relation IS 'The table, by its number in the catalogue.';
COMMENT ON COLUMN {schema}.source_partition.low      IS 'No row in it is earlier, by its bounds; -infinity if they do not say.';
COMMENT ON COLUMN {schema}.source_partition.high     IS 'No row in it is later, by its bounds; infinity if they do not say.';
COMMENT ON COLUMN {schema}.source_partition.tracked  IS 'True if it has its triggers.';
COMMENT ON COLUMN {schema}.source_partition.queued   IS 'True once the buckets of its rows were queued, since it has its triggers.';
