// CUDA's model of execution on the CPU: blocks run one after the other, the threads of a block as
// fibers that take turns at barriers and warp functions. include/ has CUDA's names for all this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr int kWarpSize = 32;

using Site = std::source_location; // of a barrier, to tell one from another

// Runs `thread` for every thread of every block. Errors are kept for last_error().
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// Returns once all threads of the block have come here: the number of them with a true flag.
int meet_block(bool flag, Site site);

// Returns once all lanes of `mask` have come here: the value given by lane `source` of this warp,
// and the lanes that gave a value other than 0.
struct Met {
  uint64_t value;
  uint32_t nonzero;
};
Met meet_warp(uint32_t mask, uint64_t value, int source, Site site);

int lane();                                         // of the thread that runs
void* dynamic_shared();                             // as many bytes as the launch asked for
[[noreturn]] void fail(const std::string& message); // ends the kernel

enum class Error { kNone, kInvalidConfiguration, kAssert, kLaunchFailure };
Error last_error(bool clear);
const char* last_message();

template <class To, class From>
To bits_as(const From& from) {
  static_assert(sizeof(From) <= sizeof(To));
  To to{};
  std::memcpy(&to, &from, sizeof(From));
  return to;
}

template <class T>
T shuffle(uint32_t mask, T value, int source, Site site) {
  uint64_t met = meet_warp(mask, bits_as<uint64_t>(value), source, site).value;
  T out;
  std::memcpy(&out, &met, sizeof out);
  return out;
}

} // namespace emulation
