// The CPU half of the binding; it and its CUDA twin are the only files that see torch, and what they
// share (maps.h, calls.h).
//
// They use torch's stable ABI as of TORCH_TARGET_VERSION (setup.py), so that one compiled library
// serves that torch and every later one. Shapes and dtypes were checked by the Python wrappers;
// here are checked the values that only the data can tell.

#include <torch/csrc/stable/library.h>

#include "../cpu/ops.h"
#include "calls.h"

namespace {

using namespace fcos;

void parallel_for(int64_t count, int64_t grain, const cpu::Task& task) {
  torch::stable::parallel_for(0, count, grain, task);
}

// Neighbours in memory, which the elements of an expanded map (stride 0) are not.
bool points_touch(const Tensor& map) {
  return map.size(2) * map.size(3) <= 1 || layout_of(map).point == 1;
}
bool channels_touch(const Tensor& map) { return map.size(1) <= 1 || map.stride(1) == 1; }

// Along points or along channels, in both alike.
bool can_walk(const Tensor& map, const Tensor& grad) {
  return (points_touch(map) && points_touch(grad)) || (channels_touch(map) && channels_touch(grad));
}

// ---- assign_targets ----

void check_ground_truth(const AssignTargetsCall& call) {
  const int64_t* c = call.args.classes;
  int64_t num_classes = call.args.num_classes, num_boxes = call.args.num_boxes;
  bool known = std::all_of(
      c, c + call.classes.numel(), [=](int64_t k) { return k >= -1 && k < num_classes; });
  STD_TORCH_CHECK(
      known, "assign_targets: gt_classes must lie in [-1, ", num_classes,
      "); -1 is an ignored region, other values need a larger num_classes");
  const int64_t *first = call.args.offsets, *last = first + call.args.num_images;
  STD_TORCH_CHECK(
      *first == 0 && *last == num_boxes && std::is_sorted(first, last + 1),
      "assign_targets: gt_offsets must rise from 0 to the number of boxes, ", num_boxes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> assign_targets(
    const Tensor& gt_boxes, const Tensor& gt_classes, const Tensor& gt_offsets,
    std::vector<int64_t> shapes, std::vector<int64_t> strides, std::vector<int64_t> pitches,
    double offset, std::vector<double> size_ranges, int64_t num_classes, double center_radius,
    bool inclusive) {
  AssignTargetsCall call(
      gt_boxes, gt_classes, gt_offsets, shapes, strides, pitches, offset, size_ranges, num_classes,
      center_radius, inclusive);
  check_ground_truth(call);
  cpu::assign_targets(call.args, parallel_for);
  return call.outputs();
}

// ---- sigmoid_focal_loss ----

FocalLossCall focal_loss_call(
    const char* op, const std::vector<Tensor>& logits, const Tensor& labels, double alpha,
    double gamma) {
  FocalLossCall call(op, logits, labels, alpha, gamma, can_walk);
  const int32_t* y = call.args.labels;
  int num_classes = call.args.num_classes;
  bool known =
      std::all_of(y, y + labels.numel(), [=](int32_t k) { return k >= -1 && k <= num_classes; });
  STD_TORCH_CHECK(
      known, "sigmoid_focal_loss: labels must lie in [-1, ", num_classes, "]: -1 is ignored, ",
      num_classes, " is background");
  return call;
}

Tensor sigmoid_focal_loss(
    std::vector<Tensor> logits, const Tensor& labels, double alpha, double gamma) {
  FocalLossCall call = focal_loss_call("sigmoid_focal_loss", logits, labels, alpha, gamma);
  call.make_loss();
  cpu::sigmoid_focal_loss(call.args, parallel_for);
  return call.loss;
}

std::vector<Tensor> sigmoid_focal_loss_backward(
    const Tensor& grad, std::vector<Tensor> logits, const Tensor& labels, double alpha,
    double gamma) {
  const char* op = "sigmoid_focal_loss_backward";
  FocalLossCall call = focal_loss_call(op, logits, labels, alpha, gamma);
  call.make_grads(grad);
  cpu::sigmoid_focal_loss(call.args, parallel_for);
  return call.maps.take_grads();
}

std::tuple<Tensor, std::vector<Tensor>> sigmoid_focal_loss_with_gradient(
    std::vector<Tensor> logits, const Tensor& labels, const Tensor& scale, double alpha,
    double gamma) {
  const char* op = "sigmoid_focal_loss_with_gradient";
  FocalLossCall call = focal_loss_call(op, logits, labels, alpha, gamma);
  call.make_loss();
  call.make_grads(scale);
  cpu::sigmoid_focal_loss(call.args, parallel_for);
  return {call.loss, call.maps.take_grads()};
}

void sigmoid_focal_loss_correct_gradient(
    std::vector<Tensor> gradient, const Tensor& factor, std::vector<Tensor> logits,
    const Tensor& labels, const Tensor& scale, double alpha, double gamma) {
  const char* op = "sigmoid_focal_loss_correct_gradient";
  FocalLossCall call = focal_loss_call(op, logits, labels, alpha, gamma);
  call.change_grads(gradient, scale, factor);
  cpu::sigmoid_focal_loss(call.args, parallel_for);
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
  cpu::box_loss(call.args, parallel_for);
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
  call.ltrb.zero_grads(), call.quality.zero_grads();
  cpu::box_loss_backward(call.args, parallel_for);
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
  cpu::select_candidates(call.args, parallel_for);
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
  cpu::batched_nms_padded(call.args, parallel_for);
  return call.outputs();
}

Tensor batched_nms(
    const Tensor& given_boxes, const Tensor& given_scores, const Tensor& given_groups,
    double iou_threshold) {
  Tensor boxes = torch::stable::contiguous(torch::stable::to(given_boxes, ScalarType::Float));
  Tensor scores = torch::stable::contiguous(torch::stable::to(given_scores, ScalarType::Double));
  Tensor groups = torch::stable::contiguous(given_groups);
  std::vector<int64_t> kept = cpu::batched_nms(
      boxes.const_data_ptr<float>(), scores.const_data_ptr<double>(),
      groups.const_data_ptr<int64_t>(), boxes.size(0), float(iou_threshold));
  Tensor out = empty(boxes, {int64_t(kept.size())}, ScalarType::Long);
  std::copy(kept.begin(), kept.end(), out.mutable_data_ptr<int64_t>());
  return out;
}

// How this library was built, as JSON. The FCOS_D2_* macros come from setup.py.
std::string build_info() {
  return std::string("{\"torch\": \"" FCOS_D2_TORCH_VERSION "\"") +
         ", \"compiler\": \"" __VERSION__ "\"" +
         ", \"cxx_standard\": " + std::to_string(__cplusplus) +
         ", \"flags\": \"" FCOS_D2_FLAGS "\"}";
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fcos_d2, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fcos_d2, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

STABLE_TORCH_LIBRARY_IMPL(fcos_d2, CPU, m) {
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
