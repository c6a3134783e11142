// What lets one source serve g++, nvcc and the CPU emulation of CUDA: no torch, no CUDA runtime.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FCOS_HD __host__ __device__ __forceinline__
#else
#define FCOS_HD inline __attribute__((always_inline))
#endif

namespace fcos {

// The functions that formulas need, for plain numbers in full precision. Other number types (a
// vector of floats, a float with fast intrinsics) come as other structs of this shape.
template <class T>
struct ScalarMath {
  using Number = T;
  static FCOS_HD T exp(T x) { return std::exp(x); }          // of x <= 0
  static FCOS_HD T log1p(T x) { return std::log1p(x); }      // of x in [0, 1]
  static FCOS_HD T reciprocal(T x) { return T(1) / x; }      // of x in [1, 2]
  static FCOS_HD T pow(T x, T y) { return std::pow(x, y); }  // of x in [0, 1], y > 0
};

} // namespace fcos
