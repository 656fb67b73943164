#include "cpu/target_baseline.h"
// The target comes first.
#include "cpu/rel_attention_forward.h"
#include "cpu/target_end.h"
