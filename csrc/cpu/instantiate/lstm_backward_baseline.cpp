#include "cpu/target_baseline.h"
// The target comes first.
#include "cpu/lstm_backward.h"
#include "cpu/target_end.h"
