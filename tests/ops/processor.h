// Included by test_sanitizers.py before every source file of csrc, to let tests choose the
// instruction set instead of the CPU.
#pragma once

bool test_cpu_supports(const char* level);
#define __builtin_cpu_supports(level) test_cpu_supports(level)

// Compiles only the clone for the tested level.
#ifdef TEST_CPU_TARGET
#define target_clones(...) target(TEST_CPU_TARGET)
#endif
