// The CPU half of the binding; it and its CUDA twin are the only files that see torch.
//
// They use torch's stable ABI as of TORCH_TARGET_VERSION (setup.py), so that one compiled library
// serves that torch and every later one. Shapes and dtypes were checked by the Python wrappers;
// here are checked the values that only the data can tell.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/ops.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace fcos;

void parallel_for(int64_t count, int64_t grain, const cpu::Task& task) {
  torch::stable::parallel_for(0, count, grain, task);
}

cpu::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return cpu::DType::kFloat;
    case ScalarType::Half:
      return cpu::DType::kHalf;
    case ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    case ScalarType::Double:
      return cpu::DType::kDouble;
    default:
      STD_TORCH_CHECK(false, "fcos_d2: expected float32, float16, bfloat16 or float64 maps");
  }
}

double value_of(const Tensor& scalar) {
  return scalar.scalar_type() == ScalarType::Double ? *scalar.const_data_ptr<double>()
                                                    : *scalar.const_data_ptr<float>();
}

Tensor scalar_like(const Tensor& tensor, double value) {
  bool is_double = tensor.scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(
      tensor, {}, is_double ? ScalarType::Double : ScalarType::Float);
  if (is_double) {
    *out.mutable_data_ptr<double>() = value;
  } else {
    *out.mutable_data_ptr<float>() = float(value);
  }
  return out;
}

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

bool is_channels_last(const Tensor& map) {
  int64_t channels = map.size(1), width = map.size(3), height = map.size(2);
  int64_t wanted[] = {height * width * channels, 1, width * channels, channels};
  for (int i = 0; i < 4; ++i) {
    if (map.size(i) != 1 && map.stride(i) != wanted[i]) {
      return false;
    }
  }
  return true;
}

// One [B, C, H, W] tensor per level, copied only where its memory is neither NCHW nor NHWC.
class Maps {
 public:
  explicit Maps(const std::vector<Tensor>& maps) : given_(maps) {
    STD_TORCH_CHECK(
        maps.size() <= kMaxLevels, "fcos_d2: expected at most ", kMaxLevels, " levels, got ",
        maps.size());
    for (const Tensor& map : maps) {
      bool in_place = map.is_contiguous() || is_channels_last(map);
      read_.push_back(in_place ? map : torch::stable::contiguous(map));
    }
  }

  // `grads` has the memory layout of what is read, or is empty.
  void describe(cpu::Map* out, const std::vector<Tensor>& grads = {}) const {
    int64_t first_point = 0;
    for (size_t l = 0; l < read_.size(); ++l) {
      const Tensor& map = read_[l];
      int64_t points = map.size(2) * map.size(3);
      bool planes = map.is_contiguous();
      out[l] = {
          map.const_data_ptr(),
          grads.empty() ? nullptr : grads[l].mutable_data_ptr(),
          points,
          first_point,
          planes ? points : 1,
          planes ? 1 : map.size(1)};
      first_point += points;
    }
  }

  std::vector<Tensor> zeros_like() const {
    std::vector<Tensor> out = empty_like();
    for (Tensor& grad : out) {
      torch::stable::zero_(grad);
    }
    return out;
  }

  std::vector<Tensor> empty_like() const {
    std::vector<Tensor> out;
    for (const Tensor& map : read_) {
      out.push_back(torch::stable::empty_like(map));
    }
    return out;
  }

  // Gradients in the layout of the tensors that were given.
  std::vector<Tensor> restore_layout(std::vector<Tensor> grads) const {
    for (size_t l = 0; l < grads.size(); ++l) {
      if (read_[l].get() != given_[l].get()) {
        Tensor out = torch::stable::empty_like(given_[l]);
        grads[l] = torch::stable::copy_(out, grads[l]);
      }
    }
    return grads;
  }

  const Tensor& first() const { return read_[0]; }
  int64_t num_points() const {
    int64_t total = 0;
    for (const Tensor& map : read_) {
      total += map.size(2) * map.size(3);
    }
    return total;
  }

 private:
  const std::vector<Tensor>& given_;
  std::vector<Tensor> read_;
};

// ---- assign_targets ----

Levels make_levels(
    const std::vector<int64_t>& shapes, const std::vector<int64_t>& strides,
    const std::vector<int64_t>& pitches, double offset) {
  STD_TORCH_CHECK(
      strides.size() <= kMaxLevels, "fcos_d2: expected at most ", kMaxLevels, " levels, got ",
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

void check_ground_truth(
    const Tensor& boxes, const Tensor& classes, const Tensor& offsets, int64_t num_classes) {
  const int64_t* c = classes.const_data_ptr<int64_t>();
  bool known = std::all_of(
      c, c + classes.numel(), [=](int64_t k) { return k >= -1 && k < num_classes; });
  STD_TORCH_CHECK(
      known, "assign_targets: gt_classes must lie in [-1, ", num_classes,
      "); -1 is an ignored region, other values need a larger num_classes");
  const int64_t* o = offsets.const_data_ptr<int64_t>();
  int64_t last = offsets.numel() - 1;
  STD_TORCH_CHECK(
      o[0] == 0 && o[last] == boxes.size(0) && std::is_sorted(o, o + last + 1),
      "assign_targets: gt_offsets must rise from 0 to the number of boxes, ", boxes.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> assign_targets(
    const Tensor& gt_boxes, const Tensor& gt_classes, const Tensor& gt_offsets,
    std::vector<int64_t> shapes, std::vector<int64_t> strides, std::vector<int64_t> pitches,
    double offset, std::vector<double> size_ranges, int64_t num_classes, double center_radius,
    bool inclusive) {
  Tensor boxes = torch::stable::contiguous(gt_boxes), classes = torch::stable::contiguous(gt_classes);
  Tensor offsets = torch::stable::contiguous(gt_offsets);
  check_ground_truth(boxes, classes, offsets, num_classes);
  cpu::AssignTargets args{};
  args.levels = make_levels(shapes, strides, pitches, offset);
  args.num_images = offsets.numel() - 1;
  int64_t b = args.num_images, p = args.levels.num_points;
  Tensor labels = empty(boxes, {b, p}, ScalarType::Int), matched = empty(boxes, {b, p}, ScalarType::Int);
  Tensor ltrb = empty(boxes, {b, p, 4}, ScalarType::Float);
  Tensor centerness = empty(boxes, {b, p}, ScalarType::Float);
  Tensor counts = empty(boxes, {b, args.levels.count, 2}, ScalarType::Int);
  args.boxes = boxes.const_data_ptr<float>();
  args.classes = classes.const_data_ptr<int64_t>();
  args.offsets = offsets.const_data_ptr<int64_t>();
  for (int l = 0; l < args.levels.count; ++l) {
    args.ranges[l] = {float(size_ranges[2 * l]), float(size_ranges[2 * l + 1]), inclusive};
  }
  args.center_radius = float(center_radius);
  args.num_classes = int(num_classes);
  args.labels = labels.mutable_data_ptr<int32_t>();
  args.matched = matched.mutable_data_ptr<int32_t>();
  args.ltrb = ltrb.mutable_data_ptr<float>();
  args.centerness = centerness.mutable_data_ptr<float>();
  args.counts = counts.mutable_data_ptr<int32_t>();
  cpu::assign_targets(args, parallel_for);
  return {labels, matched, ltrb, centerness, counts};
}

// ---- sigmoid_focal_loss ----

cpu::FocalLoss focal_args(const Maps& logits, const Tensor& labels, double alpha, double gamma) {
  cpu::FocalLoss args{};
  args.num_levels = 0;
  args.dtype = dtype_of(logits.first());
  args.num_images = logits.first().size(0);
  args.num_points = logits.num_points();
  args.num_classes = int(logits.first().size(1));
  args.labels = labels.const_data_ptr<int32_t>();
  args.alpha = alpha, args.gamma = gamma;
  const int32_t* y = args.labels;
  bool known = std::all_of(
      y, y + labels.numel(), [&](int32_t k) { return k >= -1 && k <= args.num_classes; });
  STD_TORCH_CHECK(
      known, "sigmoid_focal_loss: labels must lie in [-1, ", args.num_classes,
      "]: -1 is ignored, ", args.num_classes, " is background");
  return args;
}

Tensor sigmoid_focal_loss(
    std::vector<Tensor> logits, const Tensor& given_labels, double alpha, double gamma) {
  Maps maps(logits);
  Tensor labels = torch::stable::contiguous(given_labels);
  cpu::FocalLoss args = focal_args(maps, labels, alpha, gamma);
  args.num_levels = int(logits.size());
  maps.describe(args.maps);
  return scalar_like(logits[0], cpu::sigmoid_focal_loss(args, parallel_for));
}

std::vector<Tensor> sigmoid_focal_loss_backward(
    const Tensor& grad, std::vector<Tensor> logits, const Tensor& given_labels, double alpha,
    double gamma) {
  Maps maps(logits);
  Tensor labels = torch::stable::contiguous(given_labels);
  cpu::FocalLoss args = focal_args(maps, labels, alpha, gamma);
  args.num_levels = int(logits.size());
  args.grad = value_of(grad);
  std::vector<Tensor> grads = maps.empty_like();
  maps.describe(args.maps, grads);
  cpu::sigmoid_focal_loss_backward(args, parallel_for);
  return maps.restore_layout(grads);
}

// ---- box_loss ----

struct BoxTargets {
  Tensor matched, ltrb, centerness;
};

BoxTargets contiguous(const Tensor& matched, const Tensor& ltrb, const Tensor& centerness) {
  return {
      torch::stable::contiguous(matched), torch::stable::contiguous(ltrb),
      torch::stable::contiguous(centerness)};
}

LossType loss_type_of(const std::string& name) {
  const char* names[] = {"iou", "linear_iou", "giou", "diou", "ciou"};
  auto found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), "box_loss: unknown loss_type ", name);
  return LossType(found - std::begin(names));
}

cpu::BoxLossArgs box_args(
    const Maps& ltrb, const Maps& quality, const BoxTargets& targets, const std::string& loss_type,
    const std::string& quality_type, bool weight_by_centerness,
    const std::vector<double>& smoothing) {
  cpu::BoxLossArgs args{};
  args.num_levels = int(smoothing.size());
  args.dtype = dtype_of(ltrb.first());
  args.num_images = ltrb.first().size(0);
  args.num_points = ltrb.num_points();
  args.matched = targets.matched.const_data_ptr<int32_t>();
  args.target_ltrb = targets.ltrb.const_data_ptr<float>();
  args.target_centerness = targets.centerness.const_data_ptr<float>();
  args.loss_type = loss_type_of(loss_type);
  args.quality_type = quality_type == "iou" ? QualityType::kIou : QualityType::kCenterness;
  args.weight_by_centerness = weight_by_centerness;
  std::copy(smoothing.begin(), smoothing.end(), args.smoothing);
  return args;
}

std::tuple<Tensor, Tensor> box_loss(
    std::vector<Tensor> ltrb, std::vector<Tensor> quality, const Tensor& matched,
    const Tensor& target_ltrb, const Tensor& target_centerness, std::string loss_type,
    std::string quality_type, bool weight_by_centerness, std::vector<double> smoothing) {
  Maps ltrb_maps(ltrb), quality_maps(quality);
  BoxTargets targets = contiguous(matched, target_ltrb, target_centerness);
  cpu::BoxLossArgs args = box_args(
      ltrb_maps, quality_maps, targets, loss_type, quality_type, weight_by_centerness, smoothing);
  ltrb_maps.describe(args.ltrb);
  quality_maps.describe(args.quality);
  cpu::BoxLossSums sums = cpu::box_loss(args, parallel_for);
  return {scalar_like(ltrb[0], sums.box), scalar_like(ltrb[0], sums.quality)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> box_loss_backward(
    const Tensor& grad_box, const Tensor& grad_quality, std::vector<Tensor> ltrb,
    std::vector<Tensor> quality, const Tensor& matched, const Tensor& target_ltrb,
    const Tensor& target_centerness, std::string loss_type, std::string quality_type,
    bool weight_by_centerness, std::vector<double> smoothing) {
  Maps ltrb_maps(ltrb), quality_maps(quality);
  BoxTargets targets = contiguous(matched, target_ltrb, target_centerness);
  cpu::BoxLossArgs args = box_args(
      ltrb_maps, quality_maps, targets, loss_type, quality_type, weight_by_centerness, smoothing);
  args.grad_box = value_of(grad_box), args.grad_quality = value_of(grad_quality);
  std::vector<Tensor> box_grads = ltrb_maps.zeros_like(), quality_grads = quality_maps.zeros_like();
  ltrb_maps.describe(args.ltrb, box_grads);
  quality_maps.describe(args.quality, quality_grads);
  cpu::box_loss_backward(args, parallel_for);
  return {ltrb_maps.restore_layout(box_grads), quality_maps.restore_layout(quality_grads)};
}

// ---- select_candidates ----

cpu::ScoreRule score_rule_of(const std::string& name) {
  return name == "sqrt" ? cpu::ScoreRule::kSqrt
      : name == "product" ? cpu::ScoreRule::kProduct
                          : cpu::ScoreRule::kCls;
}

std::tuple<Tensor, Tensor, Tensor> select_candidates(
    std::vector<Tensor> logits, std::vector<Tensor> ltrb, std::vector<Tensor> quality,
    const Tensor& image_sizes, std::vector<int64_t> strides, std::vector<int64_t> pitches,
    double offset, double score_threshold, int64_t topk, bool threshold_with_quality,
    bool rank_with_quality, std::string score_rule, bool clip) {
  Maps logits_maps(logits), ltrb_maps(ltrb), quality_maps(quality);
  Tensor sizes = torch::stable::contiguous(image_sizes);
  std::vector<int64_t> shapes;
  for (const Tensor& map : logits) {
    shapes.insert(shapes.end(), {map.size(2), map.size(3)});
  }
  cpu::SelectCandidates args{};
  logits_maps.describe(args.logits);
  ltrb_maps.describe(args.ltrb);
  quality_maps.describe(args.quality);
  args.logits_dtype = dtype_of(logits[0]);
  args.ltrb_dtype = dtype_of(ltrb[0]);
  args.quality_dtype = dtype_of(quality[0]);
  args.levels = make_levels(shapes, strides, pitches, offset);
  args.num_images = logits[0].size(0);
  args.num_classes = int(logits[0].size(1));
  args.image_sizes = sizes.const_data_ptr<int64_t>();
  args.threshold = float(score_threshold);
  args.topk = topk;
  args.threshold_with_quality = threshold_with_quality;
  args.rank_with_quality = rank_with_quality;
  args.score_rule = score_rule_of(score_rule);
  args.clip = clip;
  for (int l = 0; l < args.levels.count; ++l) {
    int64_t pairs = args.levels.level[l].num_points() * args.num_classes;
    STD_TORCH_CHECK(
        pairs <= UINT32_MAX, "select_candidates: expected H * W * K < 2^32 per level, got ", pairs);
    args.slots[l + 1] = args.slots[l] + std::min(topk, pairs);
  }
  int64_t b = args.num_images, n = args.slots[args.levels.count];
  Tensor boxes = empty(sizes, {b, n, 4}, ScalarType::Float);
  Tensor scores = empty(sizes, {b, n}, ScalarType::Float);
  Tensor classes = empty(sizes, {b, n}, ScalarType::Long);
  args.boxes = boxes.mutable_data_ptr<float>();
  args.scores = scores.mutable_data_ptr<float>();
  args.classes = classes.mutable_data_ptr<int64_t>();
  cpu::select_candidates(args, parallel_for);
  return {boxes, scores, classes};
}

// ---- batched_nms ----

std::tuple<Tensor, Tensor, Tensor, Tensor> batched_nms_padded(
    const Tensor& given_boxes, const Tensor& given_scores, const Tensor& given_classes,
    double iou_threshold, int64_t max_detections, bool class_agnostic, std::string method,
    double sigma, double min_score) {
  Tensor boxes = torch::stable::contiguous(given_boxes);
  Tensor scores = torch::stable::contiguous(given_scores);
  Tensor classes = torch::stable::contiguous(given_classes);
  cpu::PaddedNms args{};
  args.boxes = boxes.const_data_ptr<float>();
  args.scores = scores.const_data_ptr<float>();
  args.classes = classes.const_data_ptr<int64_t>();
  args.num_images = boxes.size(0), args.num_boxes = boxes.size(1);
  args.max_detections = max_detections;
  args.iou_threshold = float(iou_threshold);
  args.class_agnostic = class_agnostic;
  args.method = method == "linear" ? cpu::NmsMethod::kLinear
      : method == "gaussian"       ? cpu::NmsMethod::kGaussian
                                   : cpu::NmsMethod::kHard;
  args.sigma = float(sigma), args.min_score = float(min_score);
  int64_t b = args.num_images, d = max_detections;
  Tensor kept_boxes = empty(boxes, {b, d, 4}, ScalarType::Float);
  Tensor kept_scores = empty(boxes, {b, d}, ScalarType::Float);
  Tensor kept_classes = empty(boxes, {b, d}, ScalarType::Long);
  Tensor counts = empty(boxes, {b}, ScalarType::Int);
  args.kept_boxes = kept_boxes.mutable_data_ptr<float>();
  args.kept_scores = kept_scores.mutable_data_ptr<float>();
  args.kept_classes = kept_classes.mutable_data_ptr<int64_t>();
  args.counts = counts.mutable_data_ptr<int32_t>();
  cpu::batched_nms_padded(args, parallel_for);
  return {kept_boxes, kept_scores, kept_classes, counts};
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

STABLE_TORCH_LIBRARY_FRAGMENT(fcos_d2, m) {
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fcos_d2, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

STABLE_TORCH_LIBRARY_IMPL(fcos_d2, CPU, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets));
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward));
  m.impl("box_loss", TORCH_BOX(&box_loss));
  m.impl("box_loss_backward", TORCH_BOX(&box_loss_backward));
  m.impl("select_candidates", TORCH_BOX(&select_candidates));
  m.impl("batched_nms", TORCH_BOX(&batched_nms));
  m.impl("batched_nms_padded", TORCH_BOX(&batched_nms_padded));
}
