"""What all of it runs in: processes, devices, CUDA graphs, command lines, files."""
