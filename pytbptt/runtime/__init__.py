"""Shared infrastructure: distributed processes, devices, CUDA graphs, command lines, atomic files."""
