"""Measurements: what README.md here reports, and how to repeat it."""
