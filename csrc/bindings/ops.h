// Every op, once for both devices: allocates outputs, fills `args` with pointers to all tensors,
// and runs the kernels of the device.
//
// Only this folder depends on torch, and only on its stable ABI as of TORCH_TARGET_VERSION
// (setup.py), so one compiled library works with that version of torch and all later ones. The
// Python wrappers check shapes and dtypes. torch allocates all memory.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "losses.h"

namespace [[gnu::visibility("hidden")]] fcos { // like torch's stable Tensor

inline Levels make_levels(
    const char* op, const Integers& shapes, const Integers& strides, const Integers& pitches,
    double offset) {
  STD_TORCH_CHECK(
      strides.size() <= kMaxLevels, op, ": expected at most ", kMaxLevels, " levels, got ",
      strides.size());
  Levels levels{int(strides.size()), 0, {}};
  for (int l = 0; l < levels.count; ++l) {
    Level& level = levels.level[l];
    level.height = int(shapes[2 * l]), level.width = int(shapes[2 * l + 1]);
    level.first_point = levels.num_points;
    level.stride = float(strides[l]);
    level.pitch_y = float(pitches[2 * l]), level.pitch_x = float(pitches[2 * l + 1]);
    level.origin = float(offset * double(strides[l]));
    levels.num_points += level.num_points();
  }
  return levels;
}

// A `Device` makes the device of a tensor current during its lifetime. run(args) runs the kernels
// of an op. supports_layout() tells which maps and gradients they access in place.
template <class Device>
class Ops {
 public:
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> assign_targets(
      const Tensor& gt_boxes, const Tensor& gt_classes, const Tensor& gt_offsets, Integers shapes,
      Integers strides, Integers pitches, double offset, Numbers size_ranges, int64_t num_classes,
      double center_radius, bool inclusive, int64_t pixel_extent) {
    const char* op = "assign_targets";
    AssignTargets args{};
    Tensor boxes = input(op, "gt_boxes", gt_boxes, gt_boxes, args.boxes);
    Tensor classes = input(op, "gt_classes", gt_classes, boxes, args.classes);
    Tensor offsets = input(op, "gt_offsets", gt_offsets, boxes, args.offsets);
    args.num_boxes = int(boxes.size(0)), args.num_images = offsets.numel() - 1;
    args.levels = make_levels(op, shapes, strides, pitches, offset);
    for (int l = 0; l < args.levels.count; ++l) {
      args.ranges[l] = {float(size_ranges[2 * l]), float(size_ranges[2 * l + 1]), inclusive};
    }
    args.center_radius = float(center_radius), args.pixel_extent = float(pixel_extent);
    args.num_classes = int(num_classes);
    int64_t b = args.num_images, p = args.levels.num_points;
    Tensor labels = output(boxes, {b, p}, args.labels);
    Tensor matched = output(boxes, {b, p}, args.matched);
    Tensor ltrb = output(boxes, {b, p, 4}, args.ltrb);
    Tensor centerness = output(boxes, {b, p}, args.centerness);
    Tensor counts = output(boxes, {b, args.levels.count, 2}, args.counts);
    Tensor totals = output(boxes, {2}, args.totals);
    Device(op, boxes).run(args);
    return {labels, matched, ltrb, centerness, counts, totals};
  }

  static Tensor sigmoid_focal_loss(
      Tensors logits, const Tensor& labels, double alpha, double gamma) {
    LossTensors<Device> tensors("sigmoid_focal_loss");
    tensors.take_logits(logits, labels, alpha, gamma);
    Tensors losses = tensors.losses();
    tensors.run();
    return losses[0];
  }

  static Tensors sigmoid_focal_loss_backward(
      const Tensor& grad, Tensors logits, const Tensor& labels, double alpha, double gamma) {
    LossTensors<Device> tensors("sigmoid_focal_loss_backward");
    tensors.take_logits(logits, labels, alpha, gamma);
    tensors.multiply_gradient_by({grad});
    tensors.write_gradient_to();
    return tensors.run();
  }

  static std::tuple<Tensor, Tensor> box_loss(
      Tensors ltrb, Tensors quality, const Tensor& matched, const Tensor& target_ltrb,
      const Tensor& target_centerness, std::string loss_type, std::string quality_type,
      bool weight_by_centerness, Numbers smoothing) {
    LossTensors<Device> tensors("box_loss");
    BoxRule rule = {loss_type, quality_type, weight_by_centerness, smoothing};
    tensors.take_boxes(ltrb, quality, matched, target_ltrb, target_centerness, rule);
    Tensors losses = tensors.losses();
    tensors.run();
    return {losses[0], losses[1]};
  }

  static std::tuple<Tensors, Tensors> box_loss_backward(
      const Tensor& grad_box, const Tensor& grad_quality, Tensors ltrb, Tensors quality,
      const Tensor& matched, const Tensor& target_ltrb, const Tensor& target_centerness,
      std::string loss_type, std::string quality_type, bool weight_by_centerness,
      Numbers smoothing) {
    LossTensors<Device> tensors("box_loss_backward");
    BoxRule rule = {loss_type, quality_type, weight_by_centerness, smoothing};
    tensors.take_boxes(ltrb, quality, matched, target_ltrb, target_centerness, rule);
    tensors.multiply_gradient_by({grad_box, grad_quality});
    tensors.write_gradient_to();
    Tensors grads = tensors.run();
    auto middle = grads.begin() + int64_t(ltrb.size());
    return {Tensors(grads.begin(), middle), Tensors(middle, grads.end())};
  }

  static std::tuple<Tensors, Tensors> fcos_loss(
      Tensors logits, Tensors ltrb, Tensors quality, Tensors targets, Tensors divisors,
      Numbers weights, Numbers floors, double alpha, double gamma, std::string loss_type,
      std::string quality_type, bool weight_by_centerness, Numbers smoothing, bool with_gradient) {
    LossTensors<Device> tensors("fcos_loss");
    BoxRule rule = {loss_type, quality_type, weight_by_centerness, smoothing};
    take_all(tensors, logits, ltrb, quality, targets, alpha, gamma, rule);
    tensors.scale_by(weights, divisors, floors);
    if (with_gradient) {
      tensors.write_gradient_to();
    }
    Tensors losses = tensors.losses();
    return {losses, tensors.run()};
  }

  static void fcos_loss_gradient(
      Tensors gradient, Tensors upstream, Tensors logits, Tensors ltrb, Tensors quality,
      Tensors targets, Tensors divisors, Numbers weights, Numbers floors, double alpha,
      double gamma, std::string loss_type, std::string quality_type, bool weight_by_centerness,
      Numbers smoothing, bool is_saved) {
    LossTensors<Device> tensors("fcos_loss_gradient");
    BoxRule rule = {loss_type, quality_type, weight_by_centerness, smoothing};
    take_all(tensors, logits, ltrb, quality, targets, alpha, gamma, rule);
    tensors.scale_by(weights, divisors, floors);
    tensors.multiply_gradient_by(upstream);
    tensors.write_gradient_to(gradient, is_saved);
    tensors.run();
  }

  static std::tuple<Tensor, Tensor, Tensor> select_candidates(
      Tensors logits, Tensors ltrb, Tensors quality, const Tensor& image_sizes, Integers strides,
      Integers pitches, double offset, double score_threshold, int64_t topk,
      bool threshold_with_quality, bool rank_with_quality, std::string score_rule, bool clip,
      int64_t pixel_extent, bool drop_empty) {
    const char* op = "select_candidates";
    TensorMaps<Device> logits_maps(op, "logits", logits, logits);
    TensorMaps<Device> ltrb_maps(op, "ltrb", ltrb, logits);
    TensorMaps<Device> quality_maps(op, "quality", quality, logits);
    SelectCandidates args{};
    args.logits = logits_maps.describe(), args.logits_dtype = dtype_of(logits[0]);
    args.ltrb = ltrb_maps.describe(), args.ltrb_dtype = dtype_of(ltrb[0]);
    args.quality = quality_maps.describe(), args.quality_dtype = dtype_of(quality[0]);
    Tensor sizes = input(op, "image_sizes", image_sizes, logits[0], args.image_sizes);
    Integers shapes;
    for (const Tensor& map : logits) {
      shapes.insert(shapes.end(), {map.size(2), map.size(3)});
    }
    args.levels = make_levels(op, shapes, strides, pitches, offset);
    args.num_images = logits[0].size(0), args.num_classes = int(logits[0].size(1));
    args.threshold = float(score_threshold), args.topk = topk;
    args.threshold_with_quality = threshold_with_quality;
    args.rank_with_quality = rank_with_quality;
    args.score_rule = choose<ScoreRule>(op, "score_rule", score_rule, {"sqrt", "product", "cls"});
    args.clip = clip, args.drop_empty = drop_empty, args.pixel_extent = float(pixel_extent);
    for (int l = 0; l < args.levels.count; ++l) {
      int64_t pairs = args.levels.level[l].num_points() * args.num_classes;
      STD_TORCH_CHECK(
          pairs <= UINT32_MAX, op, ": expected H * W * K < 2^32 per level, got ", pairs);
      args.slots[l + 1] = args.slots[l] + std::min(topk, pairs);
    }
    int64_t b = args.num_images, n = args.slots[args.levels.count];
    Tensor boxes = output(sizes, {b, n, 4}, args.boxes);
    Tensor scores = output(sizes, {b, n}, args.scores);
    Tensor classes = output(sizes, {b, n}, args.classes);
    Device(op, sizes).run(args);
    return {boxes, scores, classes};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> batched_nms_padded(
      const Tensor& given_boxes, const Tensor& given_scores, const Tensor& given_classes,
      double iou_threshold, int64_t max_detections, bool class_agnostic, std::string method,
      double sigma, double min_score, int64_t pixel_extent) {
    const char* op = "batched_nms_padded";
    PaddedNms args{};
    Tensor boxes = contiguous_boxes(given_boxes);
    args.boxes = boxes.const_data_ptr<float>();
    Tensor scores = input(op, "scores", given_scores, boxes, args.scores);
    Tensor classes = input(op, "classes", given_classes, boxes, args.classes);
    args.num_images = boxes.size(0), args.num_boxes = boxes.size(1);
    args.max_detections = max_detections, args.iou_threshold = float(iou_threshold);
    args.class_agnostic = class_agnostic;
    args.method = choose<NmsMethod>(op, "method", method, {"hard", "linear", "gaussian"});
    args.sigma = float(sigma), args.min_score = float(min_score);
    args.pixel_extent = float(pixel_extent);
    int64_t b = args.num_images, d = args.max_detections;
    Tensor kept_boxes = output(boxes, {b, d, 4}, args.kept_boxes);
    Tensor kept_scores = output(boxes, {b, d}, args.kept_scores);
    Tensor kept_classes = output(boxes, {b, d}, args.kept_classes);
    Tensor counts = output(boxes, {b}, args.counts);
    Device(op, boxes).run(args);
    return {kept_boxes, kept_scores, kept_classes, counts};
  }

  template <class Library>
  static void register_in(Library& m) {
    m.impl("assign_targets", TORCH_BOX(&assign_targets));
    m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss));
    m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward));
    m.impl("box_loss", TORCH_BOX(&box_loss));
    m.impl("box_loss_backward", TORCH_BOX(&box_loss_backward));
    m.impl("fcos_loss", TORCH_BOX(&fcos_loss));
    m.impl("fcos_loss_gradient", TORCH_BOX(&fcos_loss_gradient));
    m.impl("select_candidates", TORCH_BOX(&select_candidates));
    m.impl("batched_nms", TORCH_BOX(&Device::batched_nms));
    m.impl("batched_nms_padded", TORCH_BOX(&batched_nms_padded));
  }

 private:
  static void take_all(
      LossTensors<Device>& tensors, const Tensors& logits, const Tensors& ltrb,
      const Tensors& quality, const Tensors& targets, double alpha, double gamma,
      const BoxRule& rule) {
    tensors.take_logits(logits, targets[0], alpha, gamma);
    if (!ltrb.empty()) {
      tensors.take_boxes(ltrb, quality, targets[1], targets[2], targets[3], rule);
    }
  }
};

} // namespace fcos
