#if defined(__x86_64__)
#include "common/cpu/target_avx512.h"
// The target comes first.
#include "rel_attention/cpu/forward.h"
// And ends last.
#include "common/cpu/target_end.h"
#endif
