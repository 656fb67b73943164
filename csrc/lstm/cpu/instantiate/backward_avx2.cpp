#if defined(__x86_64__)
#include "common/cpu/target_avx2.h"
// The target comes first.
#include "lstm/cpu/backward.h"
// And ends last.
#include "common/cpu/target_end.h"
#endif
