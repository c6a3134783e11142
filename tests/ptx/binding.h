// Included before csrc/bindings/cuda.cpp. Registers its ops for CPU tensors, in another namespace,
// and redirects calls for devices, streams and memory from torch to runtime.cpp.
#pragma once

#define aoti_torch_get_current_cuda_stream ptx_get_current_cuda_stream
#define aoti_torch_create_device_guard ptx_create_device_guard
#define aoti_torch_delete_device_guard ptx_delete_device_guard
#define torch_call_dispatcher ptx_call_dispatcher

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name, device, library) \
  _STABLE_TORCH_LIBRARY_IMPL(fcos_d2_ptx_raw, CPU, library, C10_UID)
