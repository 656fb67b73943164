"""Compares whole models with transformers' TransfoXL, which has its own environment: python -m benchmarks.peers"""
