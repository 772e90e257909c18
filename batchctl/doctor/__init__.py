"""Everything that makes cron jobs fail silently, looked at."""
