// The CUDA half of the binding, the twin of cpu.cpp: checks, allocates, launches, registers.
//
// Shapes and dtypes were checked by the Python wrappers, and what only the data can tell is checked
// in the kernels, so that nothing waits for the device. All memory comes from torch, all work goes
// to the current stream of the device of the tensors.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>

#include "../cuda/assign_targets.h"
#include "../cuda/batched_nms.h"
#include "../cuda/box_loss.h"
#include "../cuda/select_candidates.h"
#include "../cuda/sigmoid_focal_loss.h"
#include "calls.h"

// tests/emulation registers these functions for other tensors, under another name.
#ifndef FCOS_D2_NAMESPACE
#define FCOS_D2_NAMESPACE fcos_d2
#define FCOS_D2_DISPATCH_KEY CUDA
#endif

namespace {

using torch::stable::accelerator::DeviceGuard;
using namespace fcos;

// Makes the device of a tensor the current one, for as long as it lives.
struct Device {
  DeviceGuard guard;
  cudaStream_t stream;

  explicit Device(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(
      error != cudaErrorNoKernelImageForDevice, op, ": fcos_d2/_C_cuda.so was not built for this ",
      "GPU; on this machine type: pip install --no-deps -e .");
  STD_TORCH_CHECK(
      error != cudaErrorInvalidConfiguration, op, ": the batch is too large for one launch");
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// Kernels take any strides.
bool can_walk(const Tensor&, const Tensor&) { return true; }

// ---- assign_targets ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> assign_targets(
    const Tensor& gt_boxes, const Tensor& gt_classes, const Tensor& gt_offsets,
    std::vector<int64_t> shapes, std::vector<int64_t> strides, std::vector<int64_t> pitches,
    double offset, std::vector<double> size_ranges, int64_t num_classes, double center_radius,
    bool inclusive) {
  AssignTargetsCall call(
      gt_boxes, gt_classes, gt_offsets, shapes, strides, pitches, offset, size_ranges, num_classes,
      center_radius, inclusive);
  Device device(gt_boxes);
  check_launch("assign_targets", cuda::launch_assign_targets(call.args, device.stream));
  return call.outputs();
}

// ---- sigmoid_focal_loss ----

void run(FocalLossCall& call) {
  Device device(call.maps.first());
  Tensor partials;
  if (call.args.loss != nullptr) {
    int64_t count = std::max<int64_t>(cuda::focal_loss_partials(call.args), 0);
    partials = empty(call.maps.first(), {count}, ScalarType::Double);
  }
  double* sums = call.args.loss == nullptr ? nullptr : partials.mutable_data_ptr<double>();
  check_launch(call.op, cuda::launch_sigmoid_focal_loss(call.args, sums, device.stream));
}

Tensor sigmoid_focal_loss(
    std::vector<Tensor> logits, const Tensor& labels, double alpha, double gamma) {
  FocalLossCall call("sigmoid_focal_loss", logits, labels, alpha, gamma, can_walk);
  call.make_loss();
  run(call);
  return call.loss;
}

std::vector<Tensor> sigmoid_focal_loss_backward(
    const Tensor& grad, std::vector<Tensor> logits, const Tensor& labels, double alpha,
    double gamma) {
  FocalLossCall call("sigmoid_focal_loss_backward", logits, labels, alpha, gamma, can_walk);
  call.make_grads(grad);
  run(call);
  return call.maps.take_grads();
}

std::tuple<Tensor, std::vector<Tensor>> sigmoid_focal_loss_with_gradient(
    std::vector<Tensor> logits, const Tensor& labels, const Tensor& scale, double alpha,
    double gamma) {
  FocalLossCall call("sigmoid_focal_loss_with_gradient", logits, labels, alpha, gamma, can_walk);
  call.make_loss();
  call.make_grads(scale);
  run(call);
  return {call.loss, call.maps.take_grads()};
}

void sigmoid_focal_loss_correct_gradient(
    std::vector<Tensor> gradient, const Tensor& factor, std::vector<Tensor> logits,
    const Tensor& labels, const Tensor& scale, double alpha, double gamma) {
  FocalLossCall call("sigmoid_focal_loss_correct_gradient", logits, labels, alpha, gamma, can_walk);
  call.change_grads(gradient, scale, factor);
  run(call);
  call.maps.take_grads();
}

// ---- box_loss ----

std::tuple<Tensor, Tensor> box_loss(
    std::vector<Tensor> ltrb, std::vector<Tensor> quality, const Tensor& matched,
    const Tensor& target_ltrb, const Tensor& target_centerness, std::string loss_type,
    std::string quality_type, bool weight_by_centerness, std::vector<double> smoothing) {
  BoxLossCall call(
      "box_loss", ltrb, quality, matched, target_ltrb, target_centerness, loss_type, quality_type,
      weight_by_centerness, smoothing, can_walk);
  call.make_losses();
  Device device(ltrb[0]);
  Tensor partials = empty(ltrb[0], {2, cuda::box_loss_partials(call.args)}, ScalarType::Double);
  check_launch(
      call.op,
      cuda::launch_box_loss(call.args, partials.mutable_data_ptr<double>(), device.stream));
  return {call.box_loss, call.quality_loss};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> box_loss_backward(
    const Tensor& grad_box, const Tensor& grad_quality, std::vector<Tensor> ltrb,
    std::vector<Tensor> quality, const Tensor& matched, const Tensor& target_ltrb,
    const Tensor& target_centerness, std::string loss_type, std::string quality_type,
    bool weight_by_centerness, std::vector<double> smoothing) {
  BoxLossCall call(
      "box_loss_backward", ltrb, quality, matched, target_ltrb, target_centerness, loss_type,
      quality_type, weight_by_centerness, smoothing, can_walk);
  call.make_grads(grad_box, grad_quality);
  Device device(ltrb[0]);
  check_launch(call.op, cuda::launch_box_loss_backward(call.args, device.stream));
  return {call.ltrb.take_grads(), call.quality.take_grads()};
}

// ---- select_candidates ----

std::tuple<Tensor, Tensor, Tensor> select_candidates(
    std::vector<Tensor> logits, std::vector<Tensor> ltrb, std::vector<Tensor> quality,
    const Tensor& image_sizes, std::vector<int64_t> strides, std::vector<int64_t> pitches,
    double offset, double score_threshold, int64_t topk, bool threshold_with_quality,
    bool rank_with_quality, std::string score_rule, bool clip) {
  SelectCandidatesCall call(
      logits, ltrb, quality, image_sizes, strides, pitches, offset, score_threshold, topk,
      threshold_with_quality, rank_with_quality, score_rule, clip, can_walk);
  Device device(logits[0]);
  Tensor state = empty(logits[0], {cuda::select_candidates_state(call.args)}, ScalarType::Int);
  auto* words = static_cast<unsigned*>(state.mutable_data_ptr());
  check_launch(
      "select_candidates", cuda::launch_select_candidates(call.args, words, device.stream));
  return call.outputs();
}

// ---- batched_nms ----

std::tuple<Tensor, Tensor, Tensor, Tensor> batched_nms_padded(
    const Tensor& boxes, const Tensor& scores, const Tensor& classes, double iou_threshold,
    int64_t max_detections, bool class_agnostic, std::string method, double sigma,
    double min_score) {
  PaddedNmsCall call(
      boxes, scores, classes, iou_threshold, max_detections, class_agnostic, method, sigma,
      min_score);
  Device device(boxes);
  Tensor lowered = empty(boxes, {cuda::batched_nms_padded_scores(call.args)}, ScalarType::Float);
  check_launch(
      "batched_nms_padded",
      cuda::launch_batched_nms_padded(call.args, lowered.mutable_data_ptr<float>(), device.stream));
  return call.outputs();
}

// An operator of torch that its stable ABI names no function for.
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

// Sorted values, and where they came from. Equal ones keep their order.
std::array<Tensor, 2> sort(const Tensor& values, bool descending) {
  return call_torch(
      "aten::sort", "stable", 2, values, std::optional<bool>(true), int64_t(0), descending);
}

Tensor index_select(const Tensor& values, const Tensor& index) {
  return call_torch("aten::index_select", "", 1, values, int64_t(0), index)[0];
}

Tensor batched_nms(
    const Tensor& given_boxes, const Tensor& scores, const Tensor& groups, double iou_threshold) {
  check_device("batched_nms", "scores", scores, given_boxes);
  check_device("batched_nms", "idxs", groups, given_boxes);
  Device device(given_boxes);
  Tensor boxes = contiguous_boxes(torch::stable::to(given_boxes, ScalarType::Float));
  Tensor by_score = sort(scores, /*descending=*/true)[1];
  auto [sorted_groups, by_group] = sort(index_select(groups, by_score), /*descending=*/false);
  Tensor index = index_select(by_score, by_group);
  Tensor keep = empty(boxes, {boxes.size(0)}, ScalarType::Bool);
  cuda::FlatNms args{
      boxes.const_data_ptr<float>(),
      index.const_data_ptr<int64_t>(),
      sorted_groups.const_data_ptr<int64_t>(),
      by_group.const_data_ptr<int64_t>(),
      boxes.size(0),
      float(iou_threshold),
      keep.mutable_data_ptr<bool>()};
  Tensor state = empty(boxes, {cuda::batched_nms_state(args)}, ScalarType::Long);
  auto* words = static_cast<uint64_t*>(state.mutable_data_ptr());
  check_launch("batched_nms", cuda::launch_batched_nms(args, words, device.stream));
  // The one moment at which the host waits: how many were kept is the size of the result.
  return call_torch("aten::masked_select", "", 1, by_score, keep)[0];
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_D2_NAMESPACE, FCOS_D2_DISPATCH_KEY, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets));
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward));
  m.impl("sigmoid_focal_loss_with_gradient", TORCH_BOX(&sigmoid_focal_loss_with_gradient));
  m.impl("sigmoid_focal_loss_correct_gradient", TORCH_BOX(&sigmoid_focal_loss_correct_gradient));
  m.impl("box_loss", TORCH_BOX(&box_loss));
  m.impl("box_loss_backward", TORCH_BOX(&box_loss_backward));
  m.impl("select_candidates", TORCH_BOX(&select_candidates));
  m.impl("batched_nms", TORCH_BOX(&batched_nms));
  m.impl("batched_nms_padded", TORCH_BOX(&batched_nms_padded));
}
