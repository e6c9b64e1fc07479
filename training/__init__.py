"""The training loop, its callbacks and optimizers, and the run directory that it writes."""
