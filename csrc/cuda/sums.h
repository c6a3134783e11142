// Sums that come out the same to the last bit on every run: double precision, fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fcos::cuda {

// Sum over all threads of a block, right in thread 0. Every thread must call it. `of_warps` is
// shared memory for one number per warp.
__device__ __forceinline__ double block_sum(double value, double* of_warps) {
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

// One or two sums over [count] numbers each, which the blocks of a kernel have left.
struct Sums {
  const double* partials; // [num_sums, count]
  int64_t count;
  void* out[2]; // float, or double
  bool out_is_double;
};
cudaError_t launch_sums(const Sums& sums, int num_sums, cudaStream_t stream);

} // namespace fcos::cuda
