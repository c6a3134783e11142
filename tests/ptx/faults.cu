// Kernels that are wrong, each in one way, and kernels that show what the machine can do: the tests
// of the machine itself (test_machine.py).

#include <cuda_runtime.h>

#include <cassert>
#include <cstring>

namespace {

constexpr int kThreads = 64; // of a block
constexpr unsigned kAll = 0xffffffff;

// Where all kernels write, and read: one number per thread of the launch each, and a counter.
struct Arguments {
  int* out;
  const int* in;
  unsigned* counter; // 0
  int* scratch;      // not written yet; one number per thread, too
};

__device__ int thread() { return int(blockIdx.x * kThreads + threadIdx.x); }

// ---- wrong ----

__global__ void barrier_not_reached_by_all(Arguments) {
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

__global__ void shuffle_without_all_lanes(Arguments a) {
  if (threadIdx.x % 2 == 0) {
    a.out[thread()] = __shfl_xor_sync(kAll, 1, 1);
  }
}

__global__ void lane_outside_its_mask(Arguments a) {
  a.out[thread()] = __shfl_xor_sync(0xffff, a.in[thread()], 1);
}

__global__ void shuffle_from_outside_the_mask(Arguments a) {
  if (threadIdx.x < 2) {
    a.out[thread()] = __shfl_xor_sync(3, a.in[thread()], 2);
  }
}

// A barrier is missing between writing and reading.
__global__ void race_of_lanes(Arguments a) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = a.in[thread()];
  a.out[thread()] = values[threadIdx.x ^ 1];
}

// The same between warps, of which one may be ahead of the other.
__global__ void race_of_warps(Arguments a) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = a.in[thread()];
  __syncwarp();
  a.out[thread()] = values[threadIdx.x ^ 32];
}

__global__ void write_after_read(Arguments a) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = a.in[thread()];
  __syncthreads();
  int other = values[threadIdx.x ^ 32];
  values[threadIdx.x] = 0;
  __syncthreads();
  a.out[thread()] = other + values[threadIdx.x ^ 1];
}

__global__ void race_of_blocks(Arguments a) { a.out[threadIdx.x] = int(blockIdx.x); }

__global__ void plain_beside_atomic(Arguments a) {
  if (threadIdx.x == 0) {
    atomicAdd(a.counter, 1u);
  }
  a.out[thread()] = int(*a.counter);
}

// The last block reads what the others have written: only with a fence on either side.
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
__global__ void no_release(Arguments a) { sum_in_last_block<false, true>(a); }
__global__ void no_acquire(Arguments a) { sum_in_last_block<true, false>(a); }

__global__ void past_shared_array(Arguments a) {
  __shared__ int values[kThreads], others[kThreads];
  others[threadIdx.x] = values[threadIdx.x] = 0;
  __syncthreads();
  a.out[thread()] = (&values[0])[a.in[thread()] * 0 + int(threadIdx.x) + 1] + others[threadIdx.x];
}

__global__ void past_dynamic_shared(Arguments a) {
  extern __shared__ int values[];
  values[threadIdx.x] = 0;
  a.out[thread()] = values[threadIdx.x];
}

__global__ void past_global_array(Arguments a) { a.out[thread() + 1] = 0; }
__global__ void before_global_array(Arguments a) { a.out[thread()] = a.in[thread() - 1]; }
__global__ void null_pointer(Arguments) { static_cast<volatile int*>(nullptr)[thread()] = 0; }
__global__ void misaligned(Arguments a) { *reinterpret_cast<int4*>(a.out + 1) = int4{1, 2, 3, 4}; }
__global__ void writes_an_input(Arguments a) { const_cast<int*>(a.in)[thread()] = 0; }

__global__ void uses_garbage_in_shared(Arguments a) {
  __shared__ int values[kThreads];
  if (threadIdx.x < 32) {
    values[threadIdx.x] = 1;
  }
  __syncthreads();
  a.out[thread()] = values[threadIdx.x] + 1;
}

__global__ void uses_garbage_in_global(Arguments a) { a.out[thread()] = a.scratch[thread()] + 1; }

__global__ void reads_stale_cache(Arguments a) {
  a.scratch[thread()] = 1;
  a.out[thread()] = __ldg(&a.scratch[thread()]);
}

__global__ void waits_for_ever(Arguments a) {
  while (*static_cast<volatile unsigned*>(a.counter) == 0) {
  }
}

__global__ void __launch_bounds__(32) too_many_threads(Arguments) {}
__global__ void refuses(Arguments) { assert(threadIdx.x != 5); }
__global__ void leaves_output_unwritten(Arguments a) {
  if (threadIdx.x > 0) {
    a.out[thread()] = 1;
  }
}

// ---- right ----

__global__ void warp_functions(Arguments a) {
  unsigned lane = threadIdx.x % 32;
  int value = int(lane * lane);
  bool right = __shfl_sync(kAll, value, 3) == 9;
  right &= __shfl_xor_sync(kAll, value, 1) == int((lane ^ 1) * (lane ^ 1));
  right &= __shfl_down_sync(kAll, value, 30) == (lane < 2 ? int((lane + 30) * (lane + 30)) : value);
  right &= __shfl_up_sync(kAll, value, 1, 8) == (lane % 8 ? int((lane - 1) * (lane - 1)) : value);
  right &=
      __ballot_sync(kAll, lane < 5) == 31 && __any_sync(kAll, lane == 7) && !__all_sync(kAll, lane);
  right &= __reduce_add_sync(kAll, int(lane)) == 496 && __reduce_max_sync(kAll, value) == 961;
  if (lane < 8) { // part of a warp
    right &= __shfl_xor_sync(0xffu, value, 7) == int((lane ^ 7) * (lane ^ 7));
    __syncwarp(0xff);
  }
  right &= __syncthreads_count(threadIdx.x < 3) == 3;
  right &= __syncthreads_or(threadIdx.x == 9) && !__syncthreads_and(threadIdx.x < 63);
  a.out[thread()] = right;
}

__global__ void lanes_that_part(Arguments a) {
  __shared__ int values[kThreads];
  int sum = 0;
  for (int i = 0; i <= int(threadIdx.x); ++i) {
    sum += i % 3 == 0 ? i : 1;
    values[threadIdx.x] = sum;
    __syncwarp(1u << threadIdx.x % 32); // with itself
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

// Each block waits for the one that has begun before it.
__global__ void blocks_in_a_row(Arguments a) {
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

struct Named {
  const char* name;
  void (*kernel)(Arguments);
};
#define NAMED(kernel) {#kernel, kernel}
const Named kernels[] = {
    NAMED(barrier_not_reached_by_all),
    NAMED(different_barriers),
    NAMED(shuffle_without_all_lanes),
    NAMED(lane_outside_its_mask),
    NAMED(shuffle_from_outside_the_mask),
    NAMED(race_of_lanes),
    NAMED(race_of_warps),
    NAMED(write_after_read),
    NAMED(race_of_blocks),
    NAMED(plain_beside_atomic),
    NAMED(no_release),
    NAMED(no_acquire),
    NAMED(past_shared_array),
    NAMED(past_dynamic_shared),
    NAMED(past_global_array),
    NAMED(before_global_array),
    NAMED(null_pointer),
    NAMED(misaligned),
    NAMED(writes_an_input),
    NAMED(uses_garbage_in_shared),
    NAMED(uses_garbage_in_global),
    NAMED(reads_stale_cache),
    NAMED(waits_for_ever),
    NAMED(too_many_threads),
    NAMED(refuses),
    NAMED(leaves_output_unwritten),
    NAMED(warp_functions),
    NAMED(lanes_that_part),
    NAMED(atomics),
    NAMED(last_block),
    NAMED(blocks_in_a_row),
};

} // namespace

// Runs one kernel on blocks of 64 threads, with dynamic shared memory for 63 numbers. Returns what
// CUDA would say.
extern "C" const char* run_kernel(
    const char* name, int blocks, int* out, const int* in, unsigned* counter, int* scratch) {
  for (const Named& known : kernels) {
    if (std::strcmp(known.name, name) == 0) {
      known.kernel<<<blocks, kThreads, 63 * sizeof(int)>>>({out, in, counter, scratch});
      cudaError_t error = cudaGetLastError();
      return error == cudaSuccess ? "no error" : cudaGetErrorString(error);
    }
  }
  return "no such kernel";
}
