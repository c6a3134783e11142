// Stands in for CUDA's header of this name.
#pragma once

#include "cuda_runtime.h"

using __half = _Float16;

struct __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return float(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float2 __half22float2(__half2 x) { return {float(x.x), float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
