// The order of candidates and boxes: descending rank, ties by ascending index.
#pragma once

#include "platform.h"

namespace fcos {

// A unique key, larger for better candidates, so that any correct selection returns the same
// result, regardless of the order in which candidates are found.
FCOS_HD uint64_t ranking_key(uint32_t bits, uint32_t index) {
  return (uint64_t(bits) << 32) | uint32_t(~index);
}

// Non-negative floats sort like their bits.
FCOS_HD uint64_t ranking_key(float rank, uint32_t index) {
  return ranking_key(bits_as<uint32_t>(rank), index);
}

// Bits that sort like the float, from -inf to inf, for any float except NaN; -0 equals 0.
FCOS_HD uint32_t ordered_bits(float x) {
  uint32_t bits = bits_as<uint32_t>(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

FCOS_HD uint32_t ranking_index(uint64_t key) { return ~uint32_t(key); }

// The rank in the key of a non-negative float.
FCOS_HD float ranking_rank(uint64_t key) { return bits_as<float>(uint32_t(key >> 32)); }

} // namespace fcos
