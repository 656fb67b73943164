#if defined(__x86_64__)
#include "cpu/target_avx2.h"
// The target comes first.
#include "cpu/rel_attention_backward.h"
#include "cpu/target_end.h"
#endif
