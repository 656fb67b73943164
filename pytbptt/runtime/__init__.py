"""What everything else relies on: processes, devices, CUDA graphs, command lines, atomic files."""
