"""aggregate: dirty buckets, refresh, next grain."""
