// One call of each op: holds the tensors, makes the outputs, and says in `args` where all of it lies.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>

#include "maps.h"

namespace [[gnu::visibility("hidden")]] fcos { // as torch's stable Tensor is

inline Levels make_levels(
    const char* op, const std::vector<int64_t>& shapes, const std::vector<int64_t>& strides,
    const std::vector<int64_t>& pitches, double offset) {
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

// The value of enumeration `Choice` that `name` is the name of.
template <class Choice>
Choice choose(
    const char* op, const char* what, const std::string& name,
    std::initializer_list<const char*> names) {
  auto found = std::find(names.begin(), names.end(), name);
  STD_TORCH_CHECK(found != names.end(), op, ": unknown ", what, " ", name);
  return Choice(found - names.begin());
}

struct AssignTargetsCall {
  AssignTargets args{};
  Tensor boxes, classes, offsets;
  Tensor labels, matched, ltrb, centerness, counts;

  AssignTargetsCall(
      const Tensor& gt_boxes, const Tensor& gt_classes, const Tensor& gt_offsets,
      const std::vector<int64_t>& shapes, const std::vector<int64_t>& strides,
      const std::vector<int64_t>& pitches, double offset, const std::vector<double>& size_ranges,
      int64_t num_classes, double center_radius, bool inclusive)
      : boxes(torch::stable::contiguous(gt_boxes)),
        classes(torch::stable::contiguous(gt_classes)),
        offsets(torch::stable::contiguous(gt_offsets)) {
    check_device("assign_targets", "gt_classes", classes, boxes);
    check_device("assign_targets", "gt_offsets", offsets, boxes);
    args.boxes = boxes.const_data_ptr<float>();
    args.classes = classes.const_data_ptr<int64_t>();
    args.offsets = offsets.const_data_ptr<int64_t>();
    args.num_boxes = int(boxes.size(0));
    args.num_images = offsets.numel() - 1;
    args.levels = make_levels("assign_targets", shapes, strides, pitches, offset);
    for (int l = 0; l < args.levels.count; ++l) {
      args.ranges[l] = {float(size_ranges[2 * l]), float(size_ranges[2 * l + 1]), inclusive};
    }
    args.center_radius = float(center_radius);
    args.num_classes = int(num_classes);
    make_outputs();
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const {
    return {labels, matched, ltrb, centerness, counts};
  }

 private:
  void make_outputs() {
    int64_t b = args.num_images, p = args.levels.num_points;
    labels = empty(boxes, {b, p}, ScalarType::Int);
    matched = empty(boxes, {b, p}, ScalarType::Int);
    ltrb = empty(boxes, {b, p, 4}, ScalarType::Float);
    centerness = empty(boxes, {b, p}, ScalarType::Float);
    counts = empty(boxes, {b, args.levels.count, 2}, ScalarType::Int);
    args.labels = labels.mutable_data_ptr<int32_t>();
    args.matched = matched.mutable_data_ptr<int32_t>();
    args.ltrb = ltrb.mutable_data_ptr<float>();
    args.centerness = centerness.mutable_data_ptr<float>();
    args.counts = counts.mutable_data_ptr<int32_t>();
  }
};

// A kernel reads the gradient of a loss where it lies, so it must be what the loss was.
inline const void* number(const char* op, const char* name, const Tensor& grad, const Tensor& map) {
  check_device(op, name, grad, map);
  STD_TORCH_CHECK(
      grad.numel() == 1 && grad.scalar_type() == loss_dtype(map), op, ": ", name,
      " must be one number of the dtype of the loss");
  return grad.const_data_ptr();
}

struct FocalLossCall {
  const char* op;
  TensorMaps maps;
  Tensor labels, loss;
  FocalLoss args{};

  FocalLossCall(
      const char* op, const std::vector<Tensor>& logits, const Tensor& given_labels, double alpha,
      double gamma, CanWalk can_walk)
      : op(op),
        maps(op, "logits", logits, can_walk),
        labels(torch::stable::contiguous(given_labels)) {
    check_device(op, "labels", labels, logits[0]);
    args.dtype = dtype_of(logits[0]);
    args.num_images = labels.size(0), args.num_points = labels.size(1);
    args.num_classes = int(logits[0].size(1));
    args.labels = labels.const_data_ptr<int32_t>();
    args.alpha = alpha, args.gamma = gamma;
    args.logits = maps.describe();
  }

  void make_loss() {
    loss = empty(maps.first(), {}, loss_dtype(maps.first()));
    args.loss = loss.mutable_data_ptr();
  }

  void make_grads(const Tensor& grad) {
    maps.add_grads();
    args.logits = maps.describe();
    args.grad = number(op, "grad", grad, maps.first());
  }

  void change_grads(const std::vector<Tensor>& grads, const Tensor& grad, const Tensor& factor) {
    maps.write_to(grads);
    args.logits = maps.describe();
    args.grad = number(op, "grad", grad, maps.first());
    args.factor = number(op, "factor", factor, maps.first());
  }
};

struct BoxLossCall {
  const char* op;
  TensorMaps ltrb, quality;
  Tensor matched, target_ltrb, target_centerness;
  Tensor box_loss, quality_loss;
  BoxLossArgs args{};

  BoxLossCall(
      const char* op, const std::vector<Tensor>& ltrb, const std::vector<Tensor>& quality,
      const Tensor& matched, const Tensor& target_ltrb, const Tensor& target_centerness,
      const std::string& loss_type, const std::string& quality_type, bool weight_by_centerness,
      const std::vector<double>& smoothing, CanWalk can_walk)
      : op(op),
        ltrb(op, "ltrb", ltrb, can_walk),
        quality(op, "quality", quality, can_walk),
        matched(torch::stable::contiguous(matched)),
        target_ltrb(torch::stable::contiguous(target_ltrb)),
        target_centerness(torch::stable::contiguous(target_centerness)) {
    check_device(op, "quality", quality[0], ltrb[0]);
    check_device(op, "matched", matched, ltrb[0]);
    check_device(op, "target_ltrb", target_ltrb, ltrb[0]);
    check_device(op, "target_centerness", target_centerness, ltrb[0]);
    args.dtype = dtype_of(ltrb[0]);
    args.num_images = matched.size(0), args.num_points = matched.size(1);
    args.matched = this->matched.const_data_ptr<int32_t>();
    args.target_ltrb = this->target_ltrb.const_data_ptr<float>();
    args.target_centerness = this->target_centerness.const_data_ptr<float>();
    args.loss_type =
        choose<LossType>(op, "loss_type", loss_type, {"iou", "linear_iou", "giou", "diou", "ciou"});
    args.quality_type =
        choose<QualityType>(op, "quality_type", quality_type, {"centerness", "iou"});
    args.weight_by_centerness = weight_by_centerness;
    std::copy(smoothing.begin(), smoothing.end(), args.smoothing);
    describe();
  }

  void make_losses() {
    box_loss = empty(ltrb.first(), {}, loss_dtype(ltrb.first()));
    quality_loss = empty(ltrb.first(), {}, loss_dtype(ltrb.first()));
    args.box_loss = box_loss.mutable_data_ptr(),
    args.quality_loss = quality_loss.mutable_data_ptr();
  }

  void make_grads(const Tensor& grad_box, const Tensor& grad_quality) {
    ltrb.add_grads(), quality.add_grads();
    describe();
    args.grad_box = number(op, "grad_box", grad_box, ltrb.first());
    args.grad_quality = number(op, "grad_quality", grad_quality, ltrb.first());
  }

 private:
  void describe() { args.ltrb = ltrb.describe(), args.quality = quality.describe(); }
};

struct SelectCandidatesCall {
  TensorMaps logits, ltrb, quality;
  Tensor sizes;
  Tensor boxes, scores, classes;
  SelectCandidates args{};

  SelectCandidatesCall(
      const std::vector<Tensor>& logits, const std::vector<Tensor>& ltrb,
      const std::vector<Tensor>& quality, const Tensor& image_sizes,
      const std::vector<int64_t>& strides, const std::vector<int64_t>& pitches, double offset,
      double score_threshold, int64_t topk, bool threshold_with_quality, bool rank_with_quality,
      const std::string& score_rule, bool clip, CanWalk can_walk)
      : logits(kOp, "logits", logits, can_walk),
        ltrb(kOp, "ltrb", ltrb, can_walk),
        quality(kOp, "quality", quality, can_walk),
        sizes(torch::stable::contiguous(image_sizes)) {
    check_device(kOp, "ltrb", ltrb[0], logits[0]);
    check_device(kOp, "quality", quality[0], logits[0]);
    check_device(kOp, "image_sizes", sizes, logits[0]);
    std::vector<int64_t> shapes;
    for (const Tensor& map : logits) {
      shapes.insert(shapes.end(), {map.size(2), map.size(3)});
    }
    args.logits = this->logits.describe(), args.ltrb = this->ltrb.describe();
    args.quality = this->quality.describe();
    args.logits_dtype = dtype_of(logits[0]), args.ltrb_dtype = dtype_of(ltrb[0]);
    args.quality_dtype = dtype_of(quality[0]);
    args.levels = make_levels(kOp, shapes, strides, pitches, offset);
    args.num_images = logits[0].size(0);
    args.num_classes = int(logits[0].size(1));
    args.image_sizes = sizes.const_data_ptr<int64_t>();
    args.threshold = float(score_threshold);
    args.topk = topk;
    args.threshold_with_quality = threshold_with_quality;
    args.rank_with_quality = rank_with_quality;
    args.score_rule = choose<ScoreRule>(kOp, "score_rule", score_rule, {"sqrt", "product", "cls"});
    args.clip = clip;
    make_outputs();
  }

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {boxes, scores, classes}; }

 private:
  static constexpr const char* kOp = "select_candidates";

  void make_outputs() {
    for (int l = 0; l < args.levels.count; ++l) {
      int64_t pairs = args.levels.level[l].num_points() * args.num_classes;
      STD_TORCH_CHECK(
          pairs <= UINT32_MAX, kOp, ": expected H * W * K < 2^32 per level, got ", pairs);
      args.slots[l + 1] = args.slots[l] + std::min(args.topk, pairs);
    }
    int64_t b = args.num_images, n = args.slots[args.levels.count];
    boxes = empty(sizes, {b, n, 4}, ScalarType::Float);
    scores = empty(sizes, {b, n}, ScalarType::Float);
    classes = empty(sizes, {b, n}, ScalarType::Long);
    args.boxes = boxes.mutable_data_ptr<float>();
    args.scores = scores.mutable_data_ptr<float>();
    args.classes = classes.mutable_data_ptr<int64_t>();
  }
};

struct PaddedNmsCall {
  Tensor boxes, scores, classes;
  Tensor kept_boxes, kept_scores, kept_classes, counts;
  PaddedNms args{};

  PaddedNmsCall(
      const Tensor& given_boxes, const Tensor& given_scores, const Tensor& given_classes,
      double iou_threshold, int64_t max_detections, bool class_agnostic, const std::string& method,
      double sigma, double min_score)
      : boxes(contiguous_boxes(given_boxes)),
        scores(torch::stable::contiguous(given_scores)),
        classes(torch::stable::contiguous(given_classes)) {
    check_device(kOp, "scores", scores, boxes);
    check_device(kOp, "classes", classes, boxes);
    args.boxes = boxes.const_data_ptr<float>();
    args.scores = scores.const_data_ptr<float>();
    args.classes = classes.const_data_ptr<int64_t>();
    args.num_images = boxes.size(0), args.num_boxes = boxes.size(1);
    args.max_detections = max_detections;
    args.iou_threshold = float(iou_threshold);
    args.class_agnostic = class_agnostic;
    args.method = choose<NmsMethod>(kOp, "method", method, {"hard", "linear", "gaussian"});
    args.sigma = float(sigma), args.min_score = float(min_score);
    make_outputs();
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> outputs() const {
    return {kept_boxes, kept_scores, kept_classes, counts};
  }

 private:
  static constexpr const char* kOp = "batched_nms_padded";

  void make_outputs() {
    int64_t b = args.num_images, d = args.max_detections;
    kept_boxes = empty(boxes, {b, d, 4}, ScalarType::Float);
    kept_scores = empty(boxes, {b, d}, ScalarType::Float);
    kept_classes = empty(boxes, {b, d}, ScalarType::Long);
    counts = empty(boxes, {b}, ScalarType::Int);
    args.kept_boxes = kept_boxes.mutable_data_ptr<float>();
    args.kept_scores = kept_scores.mutable_data_ptr<float>();
    args.kept_classes = kept_classes.mutable_data_ptr<int64_t>();
    args.counts = counts.mutable_data_ptr<int32_t>();
  }
};

} // namespace fcos
