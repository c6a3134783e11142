#include "processor.h"

#include <cstdlib>
#include <cstring>

// Number of queries.
extern "C" {
int test_cpu_queries = 0;
}

// x86-64, x86-64-v3 and x86-64-v4 sort alphabetically.
bool test_cpu_supports(const char* level) {
  ++test_cpu_queries;
  const char* best = std::getenv("FCOS_D2_TEST_CPU");
  return best != nullptr && std::strcmp(level, best) <= 0;
}
