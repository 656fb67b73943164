// Baseline instruction set of the architecture: no target attributes.
#pragma once
#include <cstddef>
#include <cstdint>

#define PYTBPTT_ISA baseline
#define PYTBPTT_VECTOR_BYTES 16
#if defined(__aarch64__)
#define PYTBPTT_ACCUMULATORS 24
#else
#define PYTBPTT_ACCUMULATORS 12
#endif
