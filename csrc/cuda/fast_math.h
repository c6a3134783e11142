// exp, log1p and 1/x for loops that compute more than they read. The special function unit is four
// times slower than the rest of a multiprocessor, so it gets one instruction for each of exp and 1/x
// and none for log1p.
#pragma once

#include "../core/platform.h"

namespace fcos::cuda {

// 2^x and 1/x in one instruction each, off by at most 2 and 1 units of the last place.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

// For half-precision x: the error of exp, |x| 1e-7 at most, is that of a far smaller change of x than
// its rounding. See ScalarMath for the ranges.
struct FastMath {
  using Number = float;

  static __device__ __forceinline__ float exp(float x) { return fast_exp2(x * kLog2E); }

  // With e = exp(L) - 1 and v = 1 - exp(-L) = e / (1 + e),
  //   e + v = 2 sinh L,   e v = 4 sinh^2 (L / 2),
  // so L = (e + v) f(e v) with an f that degree 4 gives to 2e-8 of L, for small e too, which
  // log2(1 + e) would lose. The compiler shares the reciprocal with the caller, who needs it anyway.
  static __device__ __forceinline__ float log1p(float e) {
    float v = e * reciprocal(1.0f + e);
    float q = e * v;
    float f = 6.04895341e-4f;
    f = f * q - 3.49371622e-3f;
    f = f * q + 1.66531869e-2f;
    f = f * q - 8.33325039e-2f;
    f = f * q + 0.5f;
    return (e + v) * f;
  }

  static __device__ __forceinline__ float reciprocal(float x) { return fast_reciprocal(x); }
};

// For results of which every bit counts, in loops that wait for memory: as exact as single functions of
// the CUDA library. The reciprocal, whose error is cubed, loses it in a step of Newton's.
struct FineMath : FastMath {
  static __device__ __forceinline__ float exp(float x) {
    float y = x * kLog2E;
    float lost = std::fma(y, -kLn2, x); // by rounding y; it matters where x is large
    float e = fast_exp2(y);
    return std::fma(e, std::fmin(lost, 1.0f), e); // the minimum is for y = -inf, which makes NaN
  }

  static __device__ __forceinline__ float reciprocal(float x) {
    float r = fast_reciprocal(x);
    return std::fma(r, std::fma(-x, r, 1.0f), r);
  }
};

// For results that are rounded to 11 bits or fewer: off by at most 3e-5.
struct CoarseMath : FastMath {
  static __device__ __forceinline__ float log1p(float e) {
    float v = e * reciprocal(1.0f + e);
    float q = e * v;
    float f = 1.42927658e-2f;
    f = f * q - 8.29049604e-2f;
    f = f * q + 0.499988260f;
    return (e + v) * f;
  }
};

} // namespace fcos::cuda
