// Stands in for CUDA's header of this name: the part that csrc/cuda uses, on the CPU.
#pragma once

#include <algorithm>
#include <cmath>

#include "../emulator.h"

// ---- the language ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section("emulated_shared")))

#define FCOS_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  (void)(stream), emulation::launch(blocks, threads, shared_bytes, [&] { kernel(__VA_ARGS__); })
#define FCOS_ASSERT(condition, message) \
  do {                                  \
    if (!(condition)) {                 \
      emulation::fail(message);         \
    }                                   \
  } while (0)
// Off by up to the relative `error`, by as much every time for the same number.
inline float emulated_approximation(float x, float error) {
  unsigned hash = emulation::bits_as<unsigned>(x) * 2654435761u;
  return x + x * (error * float(int(hash)) * 0x1p-31f);
}
#define FCOS_APPROXIMATE(value, error) emulated_approximation(value, error)
// What the compiler cannot look through it does not fuse.
inline float emulated_rounded(float x) {
  asm("" : "+m"(x));
  return x;
}
#define FCOS_ROUNDED(value) emulated_rounded(value)

// ---- types ----

#define EMULATED_VECTOR(type, name, align)                         \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(align) name##4 { type x, y, z, w; };              \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTOR(int, int, 16)
EMULATED_VECTOR(unsigned, uint, 16)
EMULATED_VECTOR(float, float, 16)
EMULATED_VECTOR(double, double, 16)
#undef EMULATED_VECTOR

// ---- barriers and warps ----

#define EMULATED_SITE emulation::Site site = emulation::Site::current()

inline void __syncthreads(EMULATED_SITE) { emulation::meet_block(false, site); }
inline int __syncthreads_count(int predicate, EMULATED_SITE) {
  return emulation::meet_block(predicate != 0, site);
}
inline int __syncthreads_or(int predicate, EMULATED_SITE) {
  return emulation::meet_block(predicate != 0, site) > 0;
}

inline void __syncwarp(unsigned mask = 0xffffffff, EMULATED_SITE) {
  emulation::meet_warp(mask, 0, emulation::lane(), site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATED_SITE) {
  return emulation::meet_warp(mask, predicate != 0, emulation::lane(), site).nonzero;
}
inline int __any_sync(unsigned mask, int predicate, EMULATED_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATED_SITE) {
  return __ballot_sync(mask, predicate, site) == mask;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATED_SITE) {
  int first = emulation::lane() / width * width;
  return emulation::shuffle(mask, value, first + source % width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATED_SITE) {
  int source = emulation::lane() ^ bits;
  int last = emulation::lane() / width * width + width - 1;
  return emulation::shuffle(mask, value, source <= last ? source : emulation::lane(), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATED_SITE) {
  int source = emulation::lane() + int(delta);
  int last = emulation::lane() / width * width + width - 1;
  return emulation::shuffle(mask, value, source <= last ? source : emulation::lane(), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATED_SITE) {
  int source = emulation::lane() - int(delta);
  int first = emulation::lane() / width * width;
  return emulation::shuffle(mask, value, source >= first ? source : emulation::lane(), site);
}
template <class T, class Combine>
T emulated_reduce(unsigned mask, T value, Combine combine, emulation::Site site) {
  T total = value;
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) {
      T other = emulation::shuffle(mask, value, lane, site);
      total = first ? other : combine(total, other);
      first = false;
    }
  }
  return total;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, EMULATED_SITE) {
  return emulated_reduce(mask, value, [](T a, T b) { return T(a + b); }, site);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, EMULATED_SITE) {
  return emulated_reduce(mask, value, [](T a, T b) { return a < b ? b : a; }, site);
}

// ---- memory ----

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}

// A fiber gives way only at barriers, so these are atomic as they stand.
template <class T>
T emulated_exchange(T* at, T value) {
  T before = *at;
  *at = value;
  return before;
}
template <class T>
T atomicAdd(T* at, T value) {
  return emulated_exchange(at, T(*at + value));
}
template <class T>
T atomicMin(T* at, T value) {
  return emulated_exchange(at, std::min(*at, value));
}
template <class T>
T atomicMax(T* at, T value) {
  return emulated_exchange(at, std::max(*at, value));
}
template <class T>
T atomicOr(T* at, T value) {
  return emulated_exchange(at, T(*at | value));
}

// ---- numbers ----

using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) { return emulation::bits_as<float>(bits); }
inline unsigned __float_as_uint(float x) { return emulation::bits_as<unsigned>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }

// ---- the host's side ----

using cudaStream_t = struct EmulatedStream*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorAssert = 710,
  cudaErrorLaunchFailure = 719,
};

inline cudaError_t cudaGetLastError() {
  switch (emulation::last_error(/*clear=*/true)) {
    case emulation::Error::kNone:
      return cudaSuccess;
    case emulation::Error::kInvalidConfiguration:
      return cudaErrorInvalidConfiguration;
    case emulation::Error::kAssert:
      return cudaErrorAssert;
    default:
      return cudaErrorLaunchFailure;
  }
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulation::last_message();
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
