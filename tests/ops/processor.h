// Included before every source file of csrc by test_sanitizers.py: the test, not the processor,
// determines the available instruction set.
#pragma once

bool processor_of_the_test_has(const char* level);
#define __builtin_cpu_supports(level) processor_of_the_test_has(level)

// Of the clones of a function, only the one for the tested level.
#ifdef PROCESSOR_OF_THE_TEST
#define target_clones(...) target(PROCESSOR_OF_THE_TEST)
#endif
