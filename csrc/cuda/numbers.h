// Number types of the kernels: storage, computation, and conversion between them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../core/arguments.h"
#include "../core/platform.h"

namespace fcos::cuda {

// Half precision is computed in float.
template <class T>
struct Compute {
  using Type = float;
};
template <>
struct Compute<double> {
  using Type = double;
};

// Blocks of 256 threads per multiprocessor, for kernels that read logits: leaves the compiler 64
// registers (128 for float64), with which it starts all loads of a step at once.
template <class T>
constexpr int kMinBlocks = sizeof(T) == 8 ? 2 : 4;

// Calls function(T{}) with the type that is stored.
#pragma nv_exec_check_disable // the function is of the host or of the device
template <class Function>
FCOS_HD void with_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat:
      return function(float{});
    case DType::kHalf:
      return function(__half{});
    case DType::kBFloat16:
      return function(__nv_bfloat16{});
    case DType::kDouble:
      return function(double{});
  }
}

FCOS_HD float widen(float x) { return x; }
FCOS_HD double widen(double x) { return x; }
FCOS_HD float widen(__half x) { return __half2float(x); }
FCOS_HD float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

FCOS_HD void narrow(float x, float* to) { *to = x; }
FCOS_HD void narrow(double x, double* to) { *to = x; }
FCOS_HD void narrow(float x, __half* to) { *to = __float2half_rn(x); }
FCOS_HD void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// Adjacent elements that are loaded and stored together: 16 bytes, the most that one instruction
// moves, or a single element.
constexpr int kVectorBytes = 16;

template <class T, int Size>
struct Vector {
  static_assert(Size * sizeof(T) == kVectorBytes);
  uint4 bits; // kept whole: taking it apart early costs instructions
};
template <class T>
struct Vector<T, 1> {
  T element;
};

// `last_use` lets the cache evict what was read.
template <class T, int Size>
__device__ __forceinline__ Vector<T, Size> load(const T* from, bool last_use) {
  if constexpr (Size == 1) {
    return {*from};
  } else {
    const uint4* vector = reinterpret_cast<const uint4*>(from);
    return {last_use ? __ldcs(vector) : __ldg(vector)};
  }
}

// The elements whose bit is set.
template <class T, int Size>
__device__ __forceinline__ void set_minus_infinity(Vector<T, Size>* vector, unsigned elements) {
  T lanes[Size];
  memcpy(lanes, vector, sizeof lanes);
#pragma unroll
  for (int j = 0; j < Size; ++j) {
    if (elements >> j & 1) {
      narrow(typename Compute<T>::Type(-INFINITY), &lanes[j]);
    }
  }
  memcpy(vector, lanes, sizeof lanes);
}

FCOS_HD float2 widen_pair(uint32_t bits, __half) { return __half22float2(bits_as<__half2>(bits)); }
FCOS_HD float2 widen_pair(uint32_t bits, __nv_bfloat16) { // a bfloat16 is half a float
  return {bits_as<float>(bits << 16), bits_as<float>(bits & 0xffff0000u)};
}

template <class T, int Size>
__device__ __forceinline__ void unpack(
    const Vector<T, Size>& from, typename Compute<T>::Type (&out)[Size]) {
  if constexpr (Size == 1) {
    out[0] = widen(from.element);
  } else if constexpr (sizeof out == kVectorBytes) {
    memcpy(out, &from.bits, sizeof out);
  } else {
    const uint32_t words[] = {from.bits.x, from.bits.y, from.bits.z, from.bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 pair = widen_pair(words[i], T{});
      out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
  }
}

// Two numbers in one instruction.
FCOS_HD uint32_t narrow_pair(const float* x, __half) {
  return bits_as<uint32_t>(__floats2half2_rn(x[0], x[1]));
}
FCOS_HD uint32_t narrow_pair(const float* x, __nv_bfloat16) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(x[0], x[1]));
}

template <class T, int Size>
__device__ __forceinline__ void store(T* to, const typename Compute<T>::Type (&values)[Size]) {
  if constexpr (Size == 1) {
    narrow(values[0], to);
  } else {
    uint4 bits;
    if constexpr (sizeof values == sizeof bits) {
      bits = bits_as<uint4>(values);
    } else {
      bits = {
          narrow_pair(values, T{}), narrow_pair(values + 2, T{}), narrow_pair(values + 4, T{}),
          narrow_pair(values + 6, T{})};
    }
    __stwb(reinterpret_cast<uint4*>(to), bits); // one instruction; an assignment may become four
  }
}

// ---- maps ----

FCOS_HD int64_t offset(const Strides& strides, int64_t image, int channel, int64_t point) {
  return image * strides.image + channel * strides.channel + point * strides.point;
}

// Neighboring channels of a point. All loads start before the first value is converted.
template <class T, int N, class Real>
__device__ void read(const Map& map, int64_t image, int channel, int64_t point, Real* out) {
  const T* data = static_cast<const T*>(map.data);
  T stored[N];
#pragma unroll
  for (int c = 0; c < N; ++c) {
    stored[c] = data[offset(map.data_strides, image, channel + c, point)];
  }
#pragma unroll
  for (int c = 0; c < N; ++c) {
    out[c] = Real(widen(stored[c]));
  }
}

// A level of an image is a matrix, its rows contiguous: classes x points, or points x classes.
struct RowStrides {
  int64_t image, row, column;
};

inline bool has_channels_last(const Map& map) {
  return map.data_strides.channel == 1 && map.data_strides.point != 1;
}
inline RowStrides make_row_strides(const Strides& strides, bool columns_are_classes) {
  return columns_are_classes ? RowStrides{strides.image, strides.point, strides.channel}
                             : RowStrides{strides.image, strides.channel, strides.point};
}

// Whether rows consist of aligned vectors.
inline bool has_vectors(
    const void* data, const RowStrides& strides, int64_t columns, int64_t bytes) {
  return strides.column == 1 && reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         strides.image * bytes % kVectorBytes == 0 && strides.row * bytes % kVectorBytes == 0 &&
         columns * bytes % kVectorBytes == 0;
}

} // namespace fcos::cuda
