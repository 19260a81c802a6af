"""Training: the optimizer, the step, checkpoints, evaluation, the run folder and the loop."""
