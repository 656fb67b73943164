"""The source of the CUDA kernels, compiled by g++ and run on an emulator of the GPU."""
