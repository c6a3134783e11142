// The second half of a sum: one block adds what the blocks of a kernel have left.

#include "sums.h"

#include "launch.h"

namespace fcos::cuda {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ Sums sums) {
  __shared__ double of_warps[kThreads / 32];
  const double* partials = sums.partials + blockIdx.x * sums.count;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < sums.count; i += kThreads) {
    sum += partials[i];
  }
  sum = block_sum(sum, of_warps);
  if (threadIdx.x == 0) {
    void* out = sums.out[blockIdx.x];
    if (sums.out_is_double) {
      *static_cast<double*>(out) = sum;
    } else {
      *static_cast<float*>(out) = float(sum);
    }
  }
}

} // namespace

cudaError_t launch_sums(const Sums& sums, int num_sums, cudaStream_t stream) {
  sums_kernel<<<unsigned(num_sums), kThreads, 0, stream>>>(sums);
  return cudaGetLastError();
}

} // namespace fcos::cuda
