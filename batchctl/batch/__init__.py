"""run-batch: plan, guards, run, outcome."""
