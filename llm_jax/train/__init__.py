"""A training step, without a disk: its config, the loss and its gradient, the optimizer, the compiled program."""
