"""Training: settings, the loop, metrics, resuming."""
