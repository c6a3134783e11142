#include "processor.h"

#include <cstdlib>
#include <cstring>

// How often kernels have queried an instruction set.
extern "C" {
int processor_of_the_test_was_asked = 0;
}

// The levels x86-64, x86-64-v3 and x86-64-v4 sort like their names.
bool processor_of_the_test_has(const char* level) {
  ++processor_of_the_test_was_asked;
  const char* best = std::getenv("FCOS_D2_TEST_PROCESSOR");
  return best != nullptr && std::strcmp(level, best) <= 0;
}
