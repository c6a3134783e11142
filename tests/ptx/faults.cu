// Kernels with one fault each, and correct kernels, to test the interpreter (test_machine.py).

#include <cuda_runtime.h>

#include <cassert>
#include <cstring>

namespace {

constexpr int kThreads = 64; // per block
constexpr unsigned kAllLanes = 0xffffffff;

// Arrays have one element per thread of the grid.
struct Arguments {
  int* out;
  const int* in;
  unsigned* counter; // initially 0
  int* scratch;      // uninitialized
};

__device__ int thread() { return int(blockIdx.x * kThreads + threadIdx.x); }

// ---- faulty ----

__global__ void barrier_in_one_warp(Arguments) {
  if (threadIdx.x < 32) {
    __syncthreads();
  }
}

__global__ void different_barriers(Arguments a) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    a.out[thread()] = __syncthreads_count(1);
  }
}

__global__ void shuffle_in_divergent_code(Arguments a) {
  if (threadIdx.x % 2 == 0) {
    a.out[thread()] = __shfl_xor_sync(kAllLanes, 1, 1);
  }
}

__global__ void mask_without_executing_lane(Arguments a) {
  a.out[thread()] = __shfl_xor_sync(0xffff, a.in[thread()], 1);
}

__global__ void shuffle_from_lane_outside_mask(Arguments a) {
  if (threadIdx.x < 2) {
    a.out[thread()] = __shfl_xor_sync(3, a.in[thread()], 2);
  }
}

// Lacks a __syncwarp between write and read.
__global__ void race_between_lanes(Arguments a) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = a.in[thread()];
  a.out[thread()] = values[threadIdx.x ^ 1];
}

// Synchronizes the lanes of each warp, but not the two warps.
__global__ void race_between_warps(Arguments a) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = a.in[thread()];
  __syncwarp();
  a.out[thread()] = values[threadIdx.x ^ 32];
}

__global__ void write_after_read_race(Arguments a) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = a.in[thread()];
  __syncthreads();
  int other = values[threadIdx.x ^ 32];
  values[threadIdx.x] = 0;
  __syncthreads();
  a.out[thread()] = other + values[threadIdx.x ^ 1];
}

__global__ void race_between_blocks(Arguments a) { a.out[threadIdx.x] = int(blockIdx.x); }

__global__ void plain_read_of_atomic(Arguments a) {
  if (threadIdx.x == 0) {
    atomicAdd(a.counter, 1u);
  }
  a.out[thread()] = int(*a.counter);
}

// The last block to finish reads what all blocks have written. Correct only with both fences.
template <bool Release, bool Acquire>
__device__ void sum_in_last_block(Arguments a) {
  __shared__ bool is_last;
  a.scratch[thread()] = a.in[thread()];
  __syncthreads();
  if (threadIdx.x == 0) {
    Release ? __threadfence() : __threadfence_block();
    is_last = atomicAdd(a.counter, 1u) == gridDim.x - 1;
    Acquire ? __threadfence() : __threadfence_block();
  }
  __syncthreads();
  int sum = 0;
  for (unsigned i = threadIdx.x; is_last && i < gridDim.x * kThreads; i += kThreads) {
    sum += a.scratch[i];
  }
  if (is_last) {
    a.out[threadIdx.x] = sum;
  }
}
__global__ void missing_release_fence(Arguments a) { sum_in_last_block<false, true>(a); }
__global__ void missing_acquire_fence(Arguments a) { sum_in_last_block<true, false>(a); }

__global__ void shared_array_overflow(Arguments a) {
  __shared__ int values[kThreads], others[kThreads];
  others[threadIdx.x] = values[threadIdx.x] = 0;
  __syncthreads();
  a.out[thread()] = (&values[0])[a.in[thread()] * 0 + int(threadIdx.x) + 1] + others[threadIdx.x];
}

__global__ void dynamic_shared_overflow(Arguments a) {
  extern __shared__ int values[];
  values[threadIdx.x] = 0;
  a.out[thread()] = values[threadIdx.x];
}

__global__ void global_overflow(Arguments a) { a.out[thread() + 1] = 0; }
__global__ void global_underflow(Arguments a) { a.out[thread()] = a.in[thread() - 1]; }
__global__ void null_pointer(Arguments) { static_cast<volatile int*>(nullptr)[thread()] = 0; }
__global__ void misaligned_vector(Arguments a) {
  *reinterpret_cast<int4*>(a.out + 1) = int4{1, 2, 3, 4};
}
__global__ void write_to_input(Arguments a) { const_cast<int*>(a.in)[thread()] = 0; }

__global__ void uninitialized_shared(Arguments a) {
  __shared__ int values[kThreads];
  if (threadIdx.x < 32) {
    values[threadIdx.x] = 1;
  }
  __syncthreads();
  a.out[thread()] = values[threadIdx.x] + 1;
}

__global__ void uninitialized_global(Arguments a) { a.out[thread()] = a.scratch[thread()] + 1; }

__global__ void stale_read_only_cache(Arguments a) {
  a.scratch[thread()] = 1;
  a.out[thread()] = __ldg(&a.scratch[thread()]);
}

__global__ void livelock(Arguments a) {
  while (*static_cast<volatile unsigned*>(a.counter) == 0) {
  }
}

__global__ void __launch_bounds__(32) exceeds_launch_bounds(Arguments) {}
__global__ void failed_assertion(Arguments) { assert(threadIdx.x != 5); }
__global__ void unwritten_output(Arguments a) {
  if (threadIdx.x > 0) {
    a.out[thread()] = 1;
  }
}

// ---- correct ----

__global__ void collectives(Arguments a) {
  unsigned lane = threadIdx.x % 32;
  int value = int(lane * lane);
  bool right = __shfl_sync(kAllLanes, value, 3) == 9;
  right &= __shfl_xor_sync(kAllLanes, value, 1) == int((lane ^ 1) * (lane ^ 1));
  right &=
      __shfl_down_sync(kAllLanes, value, 30) == (lane < 2 ? int((lane + 30) * (lane + 30)) : value);
  right &=
      __shfl_up_sync(kAllLanes, value, 1, 8) == (lane % 8 ? int((lane - 1) * (lane - 1)) : value);
  right &= __ballot_sync(kAllLanes, lane < 5) == 31 && __any_sync(kAllLanes, lane == 7) &&
           !__all_sync(kAllLanes, lane);
  right &=
      __reduce_add_sync(kAllLanes, int(lane)) == 496 && __reduce_max_sync(kAllLanes, value) == 961;
  if (lane < 8) { // partial mask
    right &= __shfl_xor_sync(0xffu, value, 7) == int((lane ^ 7) * (lane ^ 7));
    __syncwarp(0xff);
  }
  right &= __syncthreads_count(threadIdx.x < 3) == 3;
  right &= __syncthreads_or(threadIdx.x == 9) && !__syncthreads_and(threadIdx.x < 63);
  a.out[thread()] = right;
}

__global__ void divergent_loop(Arguments a) {
  __shared__ int values[kThreads];
  int sum = 0;
  for (int i = 0; i <= int(threadIdx.x); ++i) {
    sum += i % 3 == 0 ? i : 1;
    values[threadIdx.x] = sum;
    __syncwarp(1u << threadIdx.x % 32); // a mask of one lane
  }
  __syncwarp();
  a.out[thread()] = values[threadIdx.x ^ 1];
}

__global__ void atomics(Arguments a) {
  __shared__ int values[3];
  if (threadIdx.x == 0) {
    values[0] = 0, values[1] = 100, values[2] = -1;
  }
  __syncthreads();
  atomicAdd(&values[0], int(threadIdx.x));
  atomicMin(&values[1], int(threadIdx.x));
  atomicMax(&values[2], int(threadIdx.x));
  __syncthreads();
  a.out[thread()] = values[threadIdx.x % 3];
}

__global__ void last_block(Arguments a) { sum_in_last_block<true, true>(a); }

// Each block waits for the block that started before it.
__global__ void chained_blocks(Arguments a) {
  __shared__ unsigned turn;
  if (threadIdx.x == 0) {
    turn = atomicAdd(a.counter, 1u);
    volatile int* flags = a.scratch;
    while (turn > 0 && flags[turn - 1] != int(turn)) {
    }
    flags[turn] = int(turn) + 1;
  }
  __syncthreads();
  a.out[thread()] = turn < gridDim.x;
}

struct NamedKernel {
  const char* name;
  void (*kernel)(Arguments);
};
#define NAMED(kernel) {#kernel, kernel}
const NamedKernel kernels[] = {
    NAMED(barrier_in_one_warp),
    NAMED(different_barriers),
    NAMED(shuffle_in_divergent_code),
    NAMED(mask_without_executing_lane),
    NAMED(shuffle_from_lane_outside_mask),
    NAMED(race_between_lanes),
    NAMED(race_between_warps),
    NAMED(write_after_read_race),
    NAMED(race_between_blocks),
    NAMED(plain_read_of_atomic),
    NAMED(missing_release_fence),
    NAMED(missing_acquire_fence),
    NAMED(shared_array_overflow),
    NAMED(dynamic_shared_overflow),
    NAMED(global_overflow),
    NAMED(global_underflow),
    NAMED(null_pointer),
    NAMED(misaligned_vector),
    NAMED(write_to_input),
    NAMED(uninitialized_shared),
    NAMED(uninitialized_global),
    NAMED(stale_read_only_cache),
    NAMED(livelock),
    NAMED(exceeds_launch_bounds),
    NAMED(failed_assertion),
    NAMED(unwritten_output),
    NAMED(collectives),
    NAMED(divergent_loop),
    NAMED(atomics),
    NAMED(last_block),
    NAMED(chained_blocks),
};

} // namespace

// Runs a kernel with 64 threads per block and dynamic shared memory for 63 ints. Returns the CUDA
// error string.
extern "C" const char* run_kernel(
    const char* name, int blocks, int* out, const int* in, unsigned* counter, int* scratch) {
  for (const NamedKernel& known : kernels) {
    if (std::strcmp(known.name, name) == 0) {
      known.kernel<<<blocks, kThreads, 63 * sizeof(int)>>>({out, in, counter, scratch});
      cudaError_t error = cudaGetLastError();
      return error == cudaSuccess ? "no error" : cudaGetErrorString(error);
    }
  }
  return "no such kernel";
}
