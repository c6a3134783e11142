// Replaces the CUDA runtime, and the functions of torch that csrc/bindings calls for GPUs. Kernels
// that nvcc's host code launches run synchronously in the interpreter.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>

#include "machine.h"

namespace ptx {
namespace {

std::mutex mutex;                                         // serializes launches of host threads
std::map<std::string, std::unique_ptr<Program>> programs; // by file
cudaError_t error = cudaSuccess;
std::string message;

// Kernel names by host function. A function-local static, since static initializers of other files
// register kernels.
std::unordered_map<const void*, std::string>& names() {
  static std::unordered_map<const void*, std::string> out;
  return out;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

cudaError_t fail(cudaError_t code, const std::string& why) {
  message = why;
  return error = code;
}

Kernel* find_kernel(const std::string& name) {
  for (const auto& [file, program] : programs) {
    if (program->has(name)) {
      return &program->find(name);
    }
  }
  return nullptr;
}

void run(const std::string& name, dim3 grid, dim3 block, void** arguments, size_t shared) {
  Kernel* found = find_kernel(name);
  if (found == nullptr) {
    throw Fault("no PTX of kernel " + name);
  }
  Kernel& kernel = *found;
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    auto [begin, end] = kernel.parameters[i];
    std::memcpy(kernel.arguments.data() + begin, arguments[i], end - begin);
  }
  if (block.x > unsigned(kernel.max_threads)) {
    throw Fault("more threads than __launch_bounds__ of " + name + " allows");
  }
  std::vector<std::vector<char>> before;
  for (const std::vector<char>* variable : kernel.variables) {
    machine.memory.add(variable->data(), variable->size(), true, /*is_read_only=*/false);
    before.push_back(*variable);
  }
  try {
    machine.launch(kernel, grid.x, block.x, shared);
  } catch (const Fault&) { // restore variables for later tests; a CUDA context would be lost
    for (size_t i = 0; i < before.size(); ++i) {
      std::ranges::copy(before[i], const_cast<char*>(kernel.variables[i]->data()));
    }
    throw;
  }
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared) {
  std::lock_guard<std::mutex> lock(mutex);
  bool is_flat = grid.y * grid.z == 1 && block.y * block.z == 1; // the interpreter only supports x
  if (grid.x == 0 || grid.x > INT32_MAX || block.x == 0 || block.x > 1024 || !is_flat) {
    return fail(cudaErrorInvalidConfiguration, "invalid configuration argument");
  }
  try {
    run(names().at(function), grid, block, arguments, shared);
    return cudaSuccess;
  } catch (const Fault& fault) {
    return fail(fault.is_assertion ? cudaErrorAssert : cudaErrorLaunchFailure, fault.what());
  } catch (const std::exception& error) {
    return fail(cudaErrorInvalidPtx, error.what());
  }
}

constexpr const char* kEventNames[kNumEvents] = {
    "instructions", "global accesses", "shared accesses", "atomics", "barriers"};

std::string to_json(const Counts& counts) {
  std::string out;
  for (size_t i = 0; i < kNumEvents; ++i) {
    out += (i == 0 ? "{\"" : ", \"") + std::string(kEventNames[i]) + "\": ";
    out += std::to_string(counts[i]);
  }
  return out + "}";
}

std::string to_json(const std::string& name, const Machine::Record& record) {
  std::string lines;
  Kernel* kernel = find_kernel(name);
  for (size_t i = 0; kernel != nullptr && i < kernel->code.size(); ++i) {
    if (std::exchange(kernel->executed[i], uint8_t(0))) {
      lines += (lines.empty() ? "" : ", ") + std::to_string(kernel->sources[i].line);
    }
  }
  return "{\"launches\": " + std::to_string(record.launches) +
         ", \"blocks\": " + std::to_string(record.blocks) +
         ", \"threads\": " + std::to_string(record.threads) +
         ", \"shared bytes\": " + std::to_string(record.shared_bytes) +
         ", \"all\": " + to_json(record.all) + ", \"longest\": " + to_json(record.longest) +
         ", \"lines\": [" + lines + "]}";
}

// Registers a tensor that torch has returned.
void register_tensor(StableIValue value, bool is_written) {
  auto tensor = reinterpret_cast<AtenTensorHandle>(value);
  void* data = nullptr;
  int64_t bytes = 0; // the whole storage belongs to the new tensor
  aoti_torch_get_data_ptr(tensor, &data);
  aoti_torch_get_storage_size(tensor, &bytes);
  if (is_written && machine.memory.is_argument(data)) {
    machine.memory.mark_written(data, size_t(bytes));
  } else {
    machine.memory.add(data, size_t(bytes), is_written, /*is_read_only=*/false);
  }
}

} // namespace
} // namespace ptx

// ---- the CUDA runtime ----

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
    int*) {
  ptx::names()[function] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  ptx::configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const ptx::Configuration& last = ptx::configurations.back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  ptx::configurations.pop_back();
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return ptx::launch(kernel, grid, block, arguments, shared);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  ++ptx::machine.records["cudaMemsetAsync"].launches;
  std::memset(to, value, bytes);
  ptx::machine.memory.mark_written(to, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(ptx::error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return ptx::message.c_str(); }

// ---- torch, as renamed by binding.h ----

AOTITorchError ptx_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError ptx_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError ptx_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError ptx_call_dispatcher(
    const char* name, const char* overload, StableIValue* stack, uint64_t version) {
  AOTITorchError result = torch_call_dispatcher(name, overload, stack, version);
  if (result == AOTI_TORCH_SUCCESS) {
    std::string op = name;
    bool is_empty = op == "aten::new_empty" || op == "aten::empty_like" || op == "aten::empty";
    ptx::register_tensor(stack[0], !is_empty);
    if (op == "aten::sort") {
      ptx::register_tensor(stack[1], true);
    }
  }
  return result;
}

// ---- control, for ptx.py ----

// Loads a PTX file, replacing one of the same name. Returns an error message or null.
const char* ptx_load(const char* path) {
  std::string name = path;
  try {
    ptx::programs[name.substr(name.rfind('/') + 1)] = std::make_unique<ptx::Program>(name);
    return nullptr;
  } catch (const std::exception& error) {
    return (ptx::message = error.what()).c_str();
  }
}
// Returns what has run since the last call, as JSON. By kernel: sums ("all") and maxima ("longest")
// over warps, and the lines of PTX that were executed.
const char* ptx_take_records() {
  static std::string out;
  out = "{";
  for (const auto& [kernel, record] : ptx::machine.records) {
    out += (out.size() > 1 ? ", \"" : "\"") + kernel + "\": " + ptx::to_json(kernel, record);
  }
  ptx::machine.records.clear();
  return (out += "}").c_str();
}
void ptx_set_schedule(uint64_t seed) { ptx::machine.set_schedule(seed); }
void ptx_add_tensor(const void* begin, uint64_t bytes, bool is_written, bool is_read_only) {
  ptx::machine.memory.add(begin, bytes, is_written, is_read_only, /*is_argument=*/true);
}
uint64_t ptx_count_unwritten(const void* begin, uint64_t bytes) {
  return ptx::machine.memory.count_unwritten(begin, bytes);
}
void ptx_forget_tensors() { ptx::machine.memory.clear(); }

} // extern "C"
