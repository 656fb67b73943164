"""Evaluation and text generation."""
