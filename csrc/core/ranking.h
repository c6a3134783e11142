// The order of candidates: descending rank, equal ranks by ascending index.
#pragma once

#include <cstring>

#include "platform.h"

namespace fcos {

// A key that is larger for a better candidate and unique, so that any correct selection, whatever
// the order in which candidates were found, returns the same result. The bits of a non-negative
// float order like the float.
FCOS_HD uint64_t ranking_key(float rank, uint32_t index) {
  uint32_t bits;
  std::memcpy(&bits, &rank, sizeof bits);
  return (uint64_t(bits) << 32) | uint32_t(~index);
}

FCOS_HD uint32_t ranking_index(uint64_t key) {
  return ~uint32_t(key);
}

} // namespace fcos
