#include "common/cpu/target_baseline.h"
// The target comes first.
#include "rel_attention/cpu/forward.h"
// And ends last.
#include "common/cpu/target_end.h"
