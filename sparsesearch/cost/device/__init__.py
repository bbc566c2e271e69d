"""Cost model of an accelerator: micro-runs, their fit, and predictions from the schedule that will run."""
