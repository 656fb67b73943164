"""Training: settings, the loop, checkpoints, the log."""
