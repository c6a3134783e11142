// What csrc/bindings/cuda.cpp asks torch about the GPU, answered for tensors of the CPU. build.py
// renames torch's functions to these.

#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

AOTITorchError emulated_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError emulated_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError emulated_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
