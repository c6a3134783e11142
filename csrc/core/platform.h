// Lets the same source compile with g++ and nvcc, without torch or the CUDA runtime.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FCOS_HD __host__ __device__ __forceinline__
#else
#define FCOS_HD inline __attribute__((always_inline))
#endif

namespace fcos {

// a * b, rounded and never fused with an add, so that CPU and GPU agree bitwise. Where it matters,
// CPU files turn off fp-contract.
template <class T>
FCOS_HD T mul_rn(T a, T b) {
  return a * b;
}
template <class T>
FCOS_HD T mul_rn(T a, float b) {
  return a * b;
}
FCOS_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <class To, class From>
FCOS_HD To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The math functions of the formulas, for scalars in full precision. Other number types (vectors of
// floats, floats with fast intrinsics) provide structs with the same interface.
template <class T>
struct ScalarMath {
  using Number = T;
  static FCOS_HD T exp(T x) { return std::exp(x); }         // for x <= 0
  static FCOS_HD T log1p(T x) { return std::log1p(x); }     // for x in [0, 1]
  static FCOS_HD T reciprocal(T x) { return T(1) / x; }     // for x in [1, 2]
  static FCOS_HD T pow(T x, T y) { return std::pow(x, y); } // for x in [0, 1], y > 0
};

} // namespace fcos
