// Number types of the CPU kernels: storage types, and vectors of floats with their own exp and log.
#pragma once

#include "../core/arguments.h"
#include "../core/scores.h"

// Compiles a function once per instruction set; the dynamic linker selects one.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FCOS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FCOS_CLONES
#endif

namespace fcos::cpu {

// Storage of the half-precision types; arithmetic happens in float.
struct BFloat16 {
  uint16_t bits;
};
#ifdef __aarch64__
using Half = __fp16; // g++ only supports _Float16 here since version 13
#else
using Half = _Float16;
#endif

FCOS_HD float widen(float x) { return x; }
FCOS_HD double widen(double x) { return x; }
FCOS_HD float widen(Half x) { return float(x); }
FCOS_HD float widen(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

FCOS_HD void narrow(float x, float* out) { *out = x; }
FCOS_HD void narrow(double x, double* out) { *out = x; }
FCOS_HD void narrow(float x, Half* out) { *out = Half(x); }
FCOS_HD void narrow(float x, BFloat16* out) { // to nearest, ties to even, NaN stays NaN
  uint32_t bits = bits_as<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = uint16_t(x == x ? rounded : 0x7fc0);
}

// Calls function(T{}) with the storage type of `dtype`.
template <class Function>
auto dispatch(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kHalf:
      return function(Half{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kDouble:
      return function(double{});
    default:
      return function(float{});
  }
}

// A loss and its gradient are double if the maps are, else float.
inline double gradient_scale(DType of_maps, const LossScale& scale) {
  return of_maps == DType::kDouble ? scale.of_gradient<double>() : scale.of_gradient<float>();
}
inline void set_loss(DType of_maps, double sum, const LossScale& scale, void* to) {
  if (of_maps == DType::kDouble) {
    *static_cast<double*>(to) = sum * scale.of_loss<double>();
  } else {
    *static_cast<float*>(to) = float(sum) * scale.of_loss<float>();
  }
}

// Offset of a channel of a point, in elements.
inline int64_t element(const Strides& strides, int64_t image, int64_t channel, int64_t point) {
  return image * strides.image + channel * strides.channel + point * strides.point;
}

// Sixteen floats: one AVX-512 register, two of AVX2, four of SSE2 or NEON.
constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

// ScalarMath (core/platform.h) for vectors: polynomials, which the compiler keeps in registers on
// every instruction set. The relative error is at most 1.2e-7 (tests/ops).
struct VectorMath {
  using Number = Floats;

  static FCOS_HD Floats exp(Floats x) { // see exp_of_negative
    Floats lowest = Floats{} + kLowestExponent;
    Floats e = exp_polynomial<Floats, Bits>(x < lowest ? lowest : x);
    e = x < lowest ? Floats{} : e;
    return x != x ? x : e;
  }

  static FCOS_HD Floats log1p(Floats x) { // 0 <= x <= 1; minimax polynomial for log1p(x) / x
    Floats p = Floats{} - 0.00324397957f;
    p = p * x + 0.0198512568f;
    p = p * x - 0.0569591482f;
    p = p * x + 0.106036158f;
    p = p * x - 0.153055695f;
    p = p * x + 0.196759312f;
    p = p * x - 0.249541321f;
    p = p * x + 0.333299623f;
    p = p * x - 0.499999024f;
    p = p * x + 0.999999995f;
    return p * x;
  }

  // 1 <= x <= 2. A division would cost as much as exp; instead, two Newton steps, each of which
  // squares the error, refine a parabola accurate to 1 percent.
  static FCOS_HD Floats reciprocal(Floats x) {
    Floats t = x - 1.0f;
    Floats y = (t * 0.32322689f - 0.808075133f) * t + 0.989898171f;
    y = y * (2.0f - x * y);
    return y * (2.0f - x * y);
  }

  static FCOS_HD Floats pow(Floats x, Floats y) { // only for rare exponents, so one by one
    Floats out;
    for (int i = 0; i < kLanes; ++i) {
      out[i] = std::pow(x[i], y[i]);
    }
    return out;
  }
};

} // namespace fcos::cpu
