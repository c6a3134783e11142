// Sums that are bit-identical in every run: double precision, fixed order.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace fcos::cuda {

// Sum over all threads of a block, valid in thread 0. Every thread must call it. Sums with no barrier
// between them must differ in `Number`.
template <int Number>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double of_warps[32];
  int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_down_sync(0xffffffff, value, step);
  }
  if (lane == 0) {
    of_warps[warp] = value;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < warps; ++i) {
      sum += of_warps[i];
    }
  }
  return sum;
}

// Counters of finished blocks, zero while no kernel uses them.
constexpr unsigned kTickets = 4096;
static __device__ unsigned tickets[2 * kTickets];

// The counter of a launch: the least recently used one. Launches captured in a graph may run at any
// time, so they have counters of their own.
inline cudaError_t take_ticket(cudaStream_t stream, unsigned* ticket) {
  static std::atomic<unsigned> launched = 0, captured = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(stream, &status);
  *ticket = status == cudaStreamCaptureStatusNone ? launched++ % kTickets
                                                  : kTickets + captured++ % kTickets;
  return error;
}

// Whether this block is the last one here; it then sees what thread 0 of every other block wrote.
__device__ __forceinline__ bool is_last_block(unsigned ticket) {
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(&tickets[ticket], 1u) + 1 == gridDim.x;
    __threadfence();
    if (is_last) {
      tickets[ticket] = 0;
    }
  }
  return __syncthreads_or(is_last) != 0;
}

// The block_sum() of the partial sums of a kernel's blocks.
template <int Number>
__device__ __forceinline__ double sum_partials(const double* partials, int count) {
  double sum = 0;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    sum += partials[i];
  }
  return block_sum<Number>(sum);
}

} // namespace fcos::cuda
