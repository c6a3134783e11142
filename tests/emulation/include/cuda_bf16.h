// Stands in for CUDA's header of this name.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { // to nearest, ties to even
  unsigned bits = __float_as_uint(x);
  unsigned rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fff)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
