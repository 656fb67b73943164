// The emulator's parts as one translation unit, so that calls between them can be inlined.
#include "async_operations.cpp"
#include "error_report.cpp"
#include "fibers.cpp"
#include "memory.cpp"
#include "race_detector.cpp"
#include "scheduler.cpp"
#include "synchronization.cpp"
