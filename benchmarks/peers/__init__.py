"""Whole models beside transformers' TransfoXL, which runs in an environment of its own: python -m benchmarks.peers"""
