"""The CUDA kernels' own source, compiled by g++ and run by an emulator of the GPU."""
