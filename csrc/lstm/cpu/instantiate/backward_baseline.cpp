#include "common/cpu/target_baseline.h"
// The target comes first.
#include "lstm/cpu/backward.h"
// And ends last.
#include "common/cpu/target_end.h"
