"""Training runs: the trainer, the run folder, checkpoints and metrics."""
