// Sums that are bit-identical in every run: double precision, fixed order.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cub/block/block_reduce.cuh>

#include "block.h"
#include "launch.h"

namespace fcos::cuda {

// Sum over all threads of a block, valid in thread 0. Every thread must call it. Sums with no barrier
// between them must differ in `Number`.
template <int Number>
__device__ __forceinline__ double block_sum(double value) {
  using Reduce = cub::BlockReduce<double, kThreads, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;
  __shared__ typename Reduce::TempStorage storage;
  return Reduce(storage).Sum(value);
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
  bool is_last = is_last_part(&tickets[ticket], 1, gridDim.x);
  if (is_last && threadIdx.x == 0) {
    tickets[ticket] = 0;
  }
  return is_last;
}

// The block_sum() of the partial sums of a kernel's blocks.
template <int Number>
__device__ __forceinline__ double sum_partials(const double* partials, int count) {
  double sum = 0;
  for (int i = int(threadIdx.x); i < count; i += kThreads) {
    sum += partials[i];
  }
  return block_sum<Number>(sum);
}

} // namespace fcos::cuda
