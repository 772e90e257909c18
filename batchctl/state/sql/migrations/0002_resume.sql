-- Runs that are continued, narrowed runs that can be made again, wishes to stop a run, durations that no clock moves.

ALTER TABLE {schema}.run
    ADD COLUMN accounts       text[],
    ADD COLUMN steps          text[],
    ADD COLUMN resumed        integer NOT NULL DEFAULT 0,
    ADD COLUMN duration       interval,
    ADD COLUMN stop_requested text    CHECK (stop_requested IN ('stop', 'after_step', 'now'));
COMMENT ON COLUMN {schema}.run.accounts       IS 'Accounts that take part; NULL for all of them.';
COMMENT ON COLUMN {schema}.run.steps          IS 'Steps that take part; NULL for all of the job.';
COMMENT ON COLUMN {schema}.run.resumed        IS 'How many times the run was continued after it had ended.';
COMMENT ON COLUMN {schema}.run.duration       IS 'How long it ran, by a counter that never jumps; since it was last continued.';
COMMENT ON COLUMN {schema}.run.stop_requested IS 'How another host asked the run to end: stop, after_step or now; read at each heartbeat.';

COMMENT ON COLUMN {schema}.state.last_run_id IS 'The run that last started or went on; rollups have none.';

ALTER TABLE {schema}.skip ADD COLUMN token text UNIQUE;
COMMENT ON COLUMN {schema}.skip.token IS 'Chosen by whoever was skipped, so that a record that is repeated is not made twice.';

ALTER TABLE {schema}.step_run
    ADD COLUMN resumed     integer NOT NULL DEFAULT 0,
    ADD COLUMN config_hash text;
COMMENT ON COLUMN {schema}.step_run.resumed     IS 'In which part of the run the attempt was made: how many times it had been continued.';
COMMENT ON COLUMN {schema}.step_run.config_hash IS 'Hash of what the attempt was told to do: command, env, quantity.';
