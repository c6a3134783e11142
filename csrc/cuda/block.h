// Operations of a whole block: sorting, and the best of many keys. All threads of the block must call
// these functions. Each ends with a barrier, unless it says otherwise.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cuda/atomic>

namespace fcos::cuda {

constexpr unsigned kAllLanes = 0xffffffff;

__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % 32; }

// A number in global memory that other blocks may access at the same time.
template <class T>
using Atomic = ::cuda::atomic_ref<T, ::cuda::thread_scope_device>;
constexpr auto kRelaxed = ::cuda::memory_order_relaxed;

// Adds to a counter of finished parts. Returns whether all `total` parts are finished. This block then
// sees what the others wrote before their last barriers, and what their threads 0 wrote later.
__device__ __forceinline__ bool is_last_part(unsigned* finished, unsigned parts, unsigned total) {
  bool is_last = false;
  if (threadIdx.x == 0) {
    Atomic<unsigned> counter(*finished);
    is_last = counter.fetch_add(parts, ::cuda::memory_order_acq_rel) + parts == total;
  }
  return __syncthreads_or(is_last);
}

// Calls take(valid, key) with key = load(i) for all i < count; 0 is no valid key. Each thread has
// `Each` loads in flight. If `InPlace`, `take` may overwrite the keys that have been loaded, and sees
// what any thread wrote before the call.
template <int Threads, int Each, bool InPlace, class Load, class Take>
__device__ void for_each_key(int64_t count, Load&& load, Take&& take) {
  for (int64_t first = 0; first < count; first += Each * Threads) {
    uint64_t keys[Each];
#pragma unroll
    for (int k = 0; k < Each; ++k) {
      int64_t i = first + k * Threads + threadIdx.x;
      keys[k] = i < count ? load(i) : 0;
    }
    if constexpr (InPlace) {
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < Each; ++k) {
      take(keys[k] != 0, keys[k]);
    }
  }
  __syncthreads();
}

// Sorts keys in shared or global memory, the largest first: the bitonic network, in the form in which
// every exchange points the same way, so that `count` may be any number. The first warp sorts up to 32
// keys alone; other warps see them only after the next barrier.
template <int Threads>
__device__ void sort_descending(uint64_t* keys, unsigned count) {
  for (int run = 0; (1u << run) < count; ++run) { // sorted runs of 2^run become twice as long
    for (int step = run; step >= 0; --step) {
      unsigned length = 1u << step, pairs = (count + 2 * length - 1) / (2 * length) * length;
      unsigned distance = step == run ? 2 * length - 1 : length; // in the bits that differ
      for (unsigned i = threadIdx.x; i < pairs; i += Threads) {
        unsigned low = i + (i & ~(length - 1)), high = low ^ distance;
        if (high < count && keys[low] < keys[high]) {
          uint64_t key = keys[low];
          keys[low] = keys[high];
          keys[high] = key;
        }
      }
      int next = step > 0 ? step - 1 : run + 1;
      if (max(step, next) < 6) { // a warp has 64 keys to itself
        __syncwarp();
      } else {
        __syncthreads();
      }
    }
  }
}

// Appends the keys of all lanes of a warp for which `valid` holds to a list that may overflow: then
// `count` ends above the capacity. Returns the place of a key, above it too. The lanes of a warp must
// call it together.
__device__ __forceinline__ unsigned append(
    bool valid, uint64_t key, uint64_t* keys, unsigned capacity, unsigned* count) {
  unsigned lanes = __ballot_sync(kAllLanes, valid);
  if (lanes == 0) {
    return 0;
  }
  int leader = __ffs(int(lanes)) - 1;
  unsigned first = 0;
  if (lane_index() == leader) {
    first = atomicAdd(count, unsigned(__popc(lanes)));
  }
  first = __shfl_sync(kAllLanes, first, leader);
  unsigned at = first + unsigned(__popc(lanes & ((1u << lane_index()) - 1)));
  if (valid && at < capacity) {
    keys[at] = key;
  }
  return at;
}

// The largest key of all threads.
template <int Threads>
__device__ __forceinline__ uint64_t largest(uint64_t key) {
  using Reduce = cub::BlockReduce<uint64_t, Threads, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;
  __shared__ typename Reduce::TempStorage storage;
  __shared__ uint64_t result;
  key = Reduce(storage).Reduce(key, [](uint64_t a, uint64_t b) { return max(a, b); });
  if (threadIdx.x == 0) {
    result = key;
  }
  __syncthreads();
  return result;
}

// Keys counted by size: bin i of [low, high) has those whose distance from `low` is i << shift or
// more. The best bin is the last.
constexpr unsigned kBins = 2048;

struct Range {
  uint64_t low, high;

  __device__ bool contains(uint64_t key) const { return key >= low && key < high; }

  // So that all of the range fits into the bins.
  __device__ int shift() const {
    constexpr int kBinBits = 11;
    static_assert(1 << kBinBits == kBins);
    int bits = 64 - __clzll((long long)(high - 1 - low));
    return bits > kBinBits ? bits - kBinBits : 0;
  }
};

// Counts the valid keys of a warp, whose lanes must call it together. Equal scores fall into equal
// bins, which would contend for one counter.
__device__ __forceinline__ void count_key(bool valid, unsigned bin, unsigned* bins) {
  unsigned lanes = __ballot_sync(kAllLanes, valid);
  if (lanes == 0) {
    return;
  }
  int leader = __ffs(int(lanes)) - 1;
  bool same = bin == __shfl_sync(kAllLanes, bin, leader);
  if (__all_sync(kAllLanes, same || !valid)) {
    if (lane_index() == leader) {
      atomicAdd(&bins[bin], unsigned(__popc(lanes)));
    }
  } else if (valid) {
    atomicAdd(&bins[bin], 1u);
  }
}

// The bin of the key that is number `wanted`, counted from the best one.
struct Bin {
  int index;      // -1 where there are not as many keys
  unsigned above; // keys in better bins
  unsigned inside;
};

// Counts a block's keys in shared memory.
template <int Threads>
struct Histogram {
  using Scan = cub::BlockScan<unsigned, Threads, cub::BLOCK_SCAN_WARP_SCANS>;

  unsigned bins[kBins];
  unsigned count; // of keys: the caller's
  typename Scan::TempStorage scan;
  Bin found;

  __device__ __forceinline__ void clear() {
    for (unsigned i = threadIdx.x; i < kBins; i += Threads) {
      bins[i] = 0;
    }
    if (threadIdx.x == 0) {
      count = 0;
    }
    __syncthreads();
  }

  // Finds the bin of key number `wanted`, by the counts of these bins or of others. A barrier must
  // separate two calls.
  __device__ Bin find(const unsigned* counts, unsigned wanted) {
    constexpr int kEach = int(kBins) / Threads;
    int best = int(kBins) - 1 - int(threadIdx.x) * kEach;
    unsigned inside[kEach], above[kEach], total;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      inside[i] = counts[best - i];
    }
    Scan(scan).ExclusiveSum(inside, above, total);
    if (total < wanted) {
      return {-1, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (above[i] < wanted && above[i] + inside[i] >= wanted) {
        found = {best - i, above[i], inside[i]};
      }
    }
    __syncthreads();
    return found;
  }

  // Narrows `range`, which holds the keys of `bin`, until at most `most` keys reach range->low. The best
  // `wanted` are among them, if there are as many. Returns how many reach it. for_each(take) calls
  // take(valid, key) for all keys and ends with a barrier.
  template <class ForEach>
  __device__ unsigned narrow(
      Bin bin, unsigned wanted, unsigned most, Range* range, ForEach&& for_each) {
    unsigned above = bin.above;
    while (above + bin.inside > most) {
      int shift = range->shift();
      clear();
      for_each([&](bool valid, uint64_t key) {
        count_key(valid && range->contains(key), unsigned((key - range->low) >> shift), bins);
      });
      bin = find(bins, wanted - above);
      if (bin.index < 0) {
        break;
      }
      above += bin.above;
      range->high = min(range->high, range->low + (uint64_t(bin.index + 1) << shift));
      range->low += uint64_t(bin.index) << shift;
    }
    return above + bin.inside;
  }
};

} // namespace fcos::cuda
