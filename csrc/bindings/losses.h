// Collects the tensors of the losses, for the ops that compute some or all of them.
#pragma once

#include <optional>
#include <string>

#include "maps.h"

namespace [[gnu::visibility("hidden")]] fcos { // like torch's stable Tensor

// Returns the address of a scalar tensor with the dtype of a loss of `map`, for kernels to read.
inline const void* number(const char* op, const char* name, const Tensor& x, const Tensor& map) {
  check_device(op, name, x, map);
  STD_TORCH_CHECK(
      x.numel() == 1 && x.scalar_type() == loss_dtype(map), op, ": ", name,
      " must be one number of the dtype of the loss");
  return x.const_data_ptr();
}

struct BoxRule {
  const std::string &loss_type, &quality_type;
  bool weight_by_centerness;
  const Numbers& smoothing;
};

// Classification, box and quality losses, or those of them whose maps are given.
template <class Device>
class LossTensors {
 public:
  explicit LossTensors(const char* op) : op_(op) {}

  void take_logits(const Tensors& maps, const Tensor& labels, double alpha, double gamma) {
    FocalLoss& focal = args_.focal;
    logits_.emplace(op_, "logits", maps, maps);
    first_ = maps[0];
    hold("labels", labels, focal.labels);
    focal.dtype = dtype_of(maps[0]);
    focal.num_images = labels.size(0), focal.num_points = labels.size(1);
    focal.num_classes = int(maps[0].size(1));
    focal.alpha = alpha, focal.gamma = gamma;
    parts_.push_back({&focal.scale, &focal.loss});
  }

  void take_boxes(
      const Tensors& ltrb, const Tensors& quality, const Tensor& matched, const Tensor& target_ltrb,
      const Tensor& target_centerness, const BoxRule& rule) {
    BoxLosses& box = args_.box;
    if (!logits_) { // these select the kernels, even without logits
      first_ = ltrb[0];
      args_.focal.dtype = dtype_of(first_) == DType::kDouble ? DType::kDouble : DType::kFloat;
      args_.focal.gamma = 2;
    }
    ltrb_.emplace(op_, "ltrb", ltrb, Tensors{first_});
    quality_.emplace(op_, "quality", quality, Tensors{first_});
    STD_TORCH_CHECK(
        loss_dtype(first_) == loss_dtype(ltrb[0]), op_,
        ": expected float64 for all of the maps, or for none");
    hold("matched", matched, box.matched);
    hold("target_ltrb", target_ltrb, box.target_ltrb);
    hold("target_centerness", target_centerness, box.target_centerness);
    box.dtype = dtype_of(ltrb[0]);
    box.num_images = matched.size(0), box.num_points = matched.size(1);
    box.loss_type = choose<LossType>(
        op_, "loss_type", rule.loss_type, {"iou", "linear_iou", "giou", "diou", "ciou"});
    box.quality_type =
        choose<QualityType>(op_, "quality_type", rule.quality_type, {"centerness", "iou"});
    box.weight_by_centerness = rule.weight_by_centerness;
    std::copy(rule.smoothing.begin(), rule.smoothing.end(), box.smoothing);
    parts_.push_back({&box.box_scale, &box.box_loss});
    parts_.push_back({&box.quality_scale, &box.quality_loss});
  }

  void scale_by(const Numbers& weights, const Tensors& divisors, const Numbers& floors) {
    check_count("weights", weights.size()), check_count("floors", floors.size());
    check_count("divisors", divisors.size());
    for (size_t i = 0; i < parts_.size(); ++i) {
      const void* divisor = number(op_, "divisors", divisors[i], first_);
      *parts_[i].scale = {weights[i], divisor, floors[i], nullptr};
    }
  }

  void multiply_gradient_by(const Tensors& upstream) {
    check_count("upstream gradients", upstream.size());
    for (size_t i = 0; i < parts_.size(); ++i) {
      parts_[i].scale->upstream = number(op_, "grad", upstream[i], first_);
    }
  }

  // Requests gradients of all maps, written to `grads` or, if it is empty, to new tensors.
  void write_gradient_to(const Tensors& grads = {}, bool is_saved = false) {
    args_.wants_gradient = true, args_.is_saved = is_saved;
    auto next = grads.begin();
    for (auto* maps : {&logits_, &ltrb_, &quality_}) {
      if (*maps) {
        auto last = grads.empty() ? next : next + (*maps)->size();
        (*maps)->write_to(Tensors(next, last));
        next = last;
      }
    }
  }

  Tensors losses() {
    args_.wants_loss = true;
    Tensors losses;
    for (const Part& part : parts_) {
      losses.push_back(torch::stable::new_empty(first_, {}, loss_dtype(first_)));
      *part.loss = losses.back().mutable_data_ptr();
    }
    return losses;
  }

  // Returns the gradients of all maps, if requested.
  Tensors run() {
    args_.focal.logits = logits_ ? logits_->describe() : Maps{};
    args_.box.ltrb = ltrb_ ? ltrb_->describe() : Maps{};
    args_.box.quality = quality_ ? quality_->describe() : Maps{};
    Device(op_, first_).run(args_);
    Tensors all;
    for (auto* maps : {&logits_, &ltrb_, &quality_}) {
      Tensors grads = *maps ? (*maps)->take_grads() : Tensors{};
      all.insert(all.end(), grads.begin(), grads.end());
    }
    return all;
  }

 private:
  struct Part {
    LossScale* scale;
    void** loss;
  };

  template <class T>
  void hold(const char* name, const Tensor& given, const T*& data) {
    held_.push_back(input(op_, name, given, first_, data));
  }

  void check_count(const char* what, size_t count) const {
    STD_TORCH_CHECK(
        count == parts_.size(), op_, ": expected ", parts_.size(), " ", what, ", got ", count);
  }

  const char* op_;
  Losses args_{
      .focal = {.scale = {.weight = 1}},
      .box = {.box_scale = {.weight = 1}, .quality_scale = {.weight = 1}}};
  Tensor first_;
  Tensors held_;
  std::optional<TensorMaps<Device>> logits_, ltrb_, quality_;
  std::vector<Part> parts_;
};

} // namespace fcos
