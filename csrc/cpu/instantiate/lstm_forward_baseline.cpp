#include "cpu/target_baseline.h"
// The target comes first.
#include "cpu/lstm_forward.h"
#include "cpu/target_end.h"
