#include "cpu/target_baseline.h"
// The target comes first.
#include "cpu/rel_attention_backward.h"
#include "cpu/target_end.h"
