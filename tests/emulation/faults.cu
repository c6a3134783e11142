// Kernels that are wrong, each in one way, and kernels that show what the emulator can do: the tests
// of the emulator itself (test_emulator.py).

#include <cuda_runtime.h>

#include <cstdio>

namespace {

constexpr int kThreads = 64;

__global__ void barrier_not_reached_by_all(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  }
}

__global__ void different_barriers(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_without_all_lanes(int* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 1);
  }
}

// A barrier is missing between writing and reading: right in one order of threads only.
__global__ void race(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + kThreads - 1) % kThreads];
}

// The same between warps, of which one may be ahead of the other.
__global__ void race_of_warps(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = int(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = values[(threadIdx.x + 32) % kThreads];
}

__attribute__((noinline)) int read(const int* values, int i) { return values[i]; }

__global__ void past_shared_array(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = read(values, int(threadIdx.x) + 1);
}

__global__ void past_dynamic_shared(int* out) {
  int* values = static_cast<int*>(emulation::dynamic_shared());
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void past_global_array(int* out) { out[threadIdx.x + 1] = 0; }

__global__ void misaligned(int* out) { *reinterpret_cast<int4*>(out + 1) = make_int4(1, 2, 3, 4); }

__global__ void reads_garbage(int* out) {
  __shared__ int values[kThreads];
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void refuses(int*) { FCOS_ASSERT(threadIdx.x != 5, "thread 5 is refused"); }

__global__ void writes_nothing(int*) {}

__global__ void warp_functions(int* out) {
  unsigned lane = threadIdx.x % 32, all = 0xffffffff;
  int value = int(lane * lane);
  bool right = __shfl_sync(all, value, 3) == 9;
  right &= __shfl_xor_sync(all, value, 1) == int((lane ^ 1) * (lane ^ 1));
  right &= __shfl_down_sync(all, value, 30) == (lane < 2 ? int((lane + 30) * (lane + 30)) : value);
  right &= __shfl_up_sync(all, value, 1, 8) == (lane % 8 ? int((lane - 1) * (lane - 1)) : value);
  right &=
      __ballot_sync(all, lane < 5) == 31 && __any_sync(all, lane == 7) && !__all_sync(all, lane);
  right &= __reduce_add_sync(all, int(lane)) == 496 && __reduce_max_sync(all, value) == 961;
  if (lane < 8) { // part of a warp
    right &= __shfl_xor_sync(0xffu, value, 7) == int((lane ^ 7) * (lane ^ 7));
    __syncwarp(0xff);
  }
  right &= __syncthreads_count(threadIdx.x < 3) == 3;
  out[threadIdx.x] = right;
}

__global__ void atomics(int* out) {
  if (threadIdx.x == 0) {
    out[0] = 0, out[1] = 100, out[2] = -1;
  }
  __syncthreads();
  atomicAdd(&out[0], int(threadIdx.x));
  atomicMin(&out[1], int(threadIdx.x));
  atomicMax(&out[2], int(threadIdx.x));
}

__global__ void shared_memory(int* out) {
  __shared__ int values[kThreads];
  int i = int(threadIdx.x);
  values[i] = i;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) {
      values[i] += values[i + half];
    }
  }
  __syncthreads();
  out[i] = values[0];
}

struct Named {
  const char* name;
  void (*kernel)(int*);
};
const Named kernels[] = {
    {"barrier_not_reached_by_all", barrier_not_reached_by_all},
    {"different_barriers", different_barriers},
    {"shuffle_without_all_lanes", shuffle_without_all_lanes},
    {"race", race},
    {"race_of_warps", race_of_warps},
    {"past_shared_array", past_shared_array},
    {"past_dynamic_shared", past_dynamic_shared},
    {"past_global_array", past_global_array},
    {"misaligned", misaligned},
    {"reads_garbage", reads_garbage},
    {"refuses", refuses},
    {"writes_nothing", writes_nothing},
    {"warp_functions", warp_functions},
    {"atomics", atomics},
    {"shared_memory", shared_memory},
};

} // namespace

// Runs one kernel on one block of 64 threads, with dynamic shared memory for 63 numbers. Returns
// what CUDA would say.
extern "C" const char* run_fault(const char* name, int* out) {
  for (const Named& known : kernels) {
    if (std::strcmp(known.name, name) == 0) {
      FCOS_LAUNCH(known.kernel, 1, kThreads, 63 * sizeof(int), nullptr, out);
      return cudaGetErrorString(cudaGetLastError());
    }
  }
  return "no such kernel";
}
