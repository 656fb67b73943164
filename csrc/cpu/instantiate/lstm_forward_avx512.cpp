#if defined(__x86_64__)
#include "cpu/target_avx512.h"
// The target comes first.
#include "cpu/lstm_forward.h"
#include "cpu/target_end.h"
#endif
