"""A run, over time and on disk: its folder, the loop, checkpoints, evaluation, the report."""
