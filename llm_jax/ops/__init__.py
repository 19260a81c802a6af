"""Pure functions on arrays: attention, positions, losses, sampling. No parameters, no modules."""
