// Shared by all kernels: launching, rejecting bad data, and finding the level of a block.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <climits>

#include "../core/levels.h"

// Stops the kernel with a message that torch's own device-side assertions would print the same way.
// The error reaches the host as "device-side assert triggered", at the next synchronization.
#define FCOS_ASSERT(condition, message)                     \
  do {                                                      \
    if (!(condition)) {                                     \
      __assert_fail(message, __FILE__, __LINE__, __func__); \
    }                                                       \
  } while (0)

namespace fcos::cuda {

// Consecutive blocks, dealt out to the levels in order.
struct BlocksOfLevels {
  int num_levels = 0;
  int first[kMaxLevels + 1] = {}; // level l owns the blocks [first[l], first[l + 1])

  void append(int64_t blocks) {
    first[num_levels + 1] = int(first[num_levels] + blocks);
    ++num_levels;
  }
  FCOS_HD int total() const { return first[num_levels]; }
  FCOS_HD int level_of(int block) const {
    int level = 0;
    while (block >= first[level + 1]) {
      ++level;
    }
    return level;
  }
};

constexpr int64_t kMaxBlocks = INT_MAX; // of a grid in x

constexpr int kThreads = 256; // of a block, for targets and losses

// The fewest that a multiprocessor holds of the GPUs that this pass of the compiler is for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kThreadsOfMultiprocessor = 1024; // Turing
#else
constexpr int kThreadsOfMultiprocessor = 1536;
#endif

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

} // namespace fcos::cuda
