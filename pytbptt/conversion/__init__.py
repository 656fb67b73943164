"""Checkpoints of other projects: their files, their weights, their vocabularies."""
