"""Benchmarks, whose results README.md in this folder reports."""
