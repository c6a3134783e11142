// The CUDA ops. Checks that depend on data happen in the kernels, so that nothing waits for the
// device. All work runs on the current stream of the tensors' device.

#define USE_CUDA // makes shim.h declare the CUDA functions
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>

#include "../cuda/ops.h"
#include "ops.h"

namespace {

using namespace fcos;

// Calls a torch operator for which the stable ABI has no function.
template <class... Arguments>
std::array<Tensor, 2> call_torch(
    const char* name, const char* overload, int results, const Arguments&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  std::array<Tensor, 2> out;
  for (int i = 0; i < results; ++i) {
    out[i] = torch::stable::detail::to<Tensor>(stack[i]);
  }
  return out;
}

// Stable sort: returns the sorted values and their indices.
std::array<Tensor, 2> sort(const Tensor& values, bool descending) {
  return call_torch(
      "aten::sort", "stable", 2, values, std::optional<bool>(true), int64_t(0), descending);
}

Tensor index_select(const Tensor& values, const Tensor& index) {
  return call_torch("aten::index_select", "", 1, values, int64_t(0), index)[0];
}

struct Cuda {
  const char* op;
  const Tensor& tensor;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  Cuda(const char* op, const Tensor& tensor)
      : op(op), tensor(tensor), guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  void check(cudaError_t error) {
    STD_TORCH_CHECK(
        error != cudaErrorNoKernelImageForDevice, op,
        ": fcos_d2/_C_cuda.so was not built for this ",
        "GPU; on this machine type: pip install --no-deps -e .");
    STD_TORCH_CHECK(
        error != cudaErrorInvalidConfiguration, op,
        ": the batch is too large for one launch, or this GPU lacks what the kernel needs");
    STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
  }

  static bool supports_layout(const Tensor&, const Tensor&) { return true; }

  void run(const AssignTargets& args) {
    double* state;
    Tensor memory = output(tensor, {cuda::assign_targets_state(args)}, state);
    check(cuda::launch_assign_targets(args, state, stream));
  }

  void run(const Losses& args) {
    double* partials;
    Tensor memory = output(tensor, {cuda::fcos_loss_partials(args)}, partials);
    check(cuda::launch_fcos_loss(args, partials, stream));
  }

  void run(const SelectCandidates& args) {
    int64_t* numbers;
    Tensor memory = output(tensor, {cuda::select_candidates_memory(args)}, numbers);
    check(cuda::launch_select_candidates(args, reinterpret_cast<uint64_t*>(numbers), stream));
  }

  void run(const PaddedNms& args) {
    float* scores;
    Tensor memory = output(tensor, {cuda::batched_nms_padded_scores(args)}, scores);
    check(cuda::launch_batched_nms_padded(args, scores, stream));
  }

  static Tensor batched_nms(
      const Tensor& given_boxes, const Tensor& scores, const Tensor& groups, double iou_threshold) {
    Cuda device("batched_nms", given_boxes);
    check_device(device.op, "scores", scores, given_boxes);
    check_device(device.op, "idxs", groups, given_boxes);
    Tensor boxes = contiguous_boxes(torch::stable::to(given_boxes, ScalarType::Float));
    Tensor by_score = sort(scores, /*descending=*/true)[1];
    auto [sorted_groups, by_group] = sort(index_select(groups, by_score), /*descending=*/false);
    Tensor index = index_select(by_score, by_group);
    cuda::FlatNms args{};
    args.boxes = boxes.const_data_ptr<float>(), args.index = index.const_data_ptr<int64_t>();
    args.groups = sorted_groups.const_data_ptr<int64_t>();
    args.place = by_group.const_data_ptr<int64_t>();
    args.num_boxes = boxes.size(0), args.iou_threshold = float(iou_threshold);
    Tensor keep = output(boxes, {args.num_boxes}, args.keep);
    int64_t* state;
    Tensor memory = output(boxes, {cuda::batched_nms_state(args)}, state);
    device.check(cuda::launch_batched_nms(args, reinterpret_cast<uint64_t*>(state), device.stream));
    // The only host synchronization: the result's size is the number of kept boxes.
    return call_torch("aten::masked_select", "", 1, by_score, keep)[0];
  }
};

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fcos_d2, CUDA, m) { Ops<Cuda>::register_in(m); }
