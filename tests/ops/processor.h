// Included before every other line of csrc by test_sanitizers.py: the test, and not the processor,
// says which instructions there are.
#pragma once

bool processor_of_the_test_has(const char* level);
#define __builtin_cpu_supports(level) processor_of_the_test_has(level)

// Of functions that the compiler makes several of, the one that the test is about.
#ifdef PROCESSOR_OF_THE_TEST
#define target_clones(...) target(PROCESSOR_OF_THE_TEST)
#endif
