// The CPU ops. Checks that depend on data happen here, before the kernels.

#include <torch/headeronly/version.h>

#include "../cpu/ops.h"
#include "ops.h"

namespace {

using namespace fcos;

void parallel_for(int64_t count, int64_t grain, const cpu::Task& task) {
  torch::stable::parallel_for(0, count, grain, task);
}

// False for expanded maps, whose stride is 0.
bool has_contiguous_points(const Tensor& map) {
  return map.size(2) * map.size(3) <= 1 || strides_of(map).point == 1;
}
bool has_contiguous_channels(const Tensor& map) { return map.size(1) <= 1 || map.stride(1) == 1; }

template <class T>
bool all_within(const T* values, int64_t count, T low, T high) {
  return std::all_of(
      values, values + count, [=](T value) { return low <= value && value <= high; });
}

struct Cpu {
  Cpu(const char*, const Tensor&) {}

  static bool supports_layout(const Tensor& map, const Tensor& grad) {
    return (has_contiguous_points(map) && has_contiguous_points(grad)) ||
           (has_contiguous_channels(map) && has_contiguous_channels(grad));
  }

  void run(const AssignTargets& args) {
    STD_TORCH_CHECK(
        all_within<int64_t>(args.classes, args.num_boxes, -1, args.num_classes - 1),
        "assign_targets: gt_classes must lie in [-1, ", args.num_classes,
        "); -1 is an ignored region, other values need a larger num_classes");
    const int64_t *first = args.offsets, *last = first + args.num_images;
    STD_TORCH_CHECK(
        *first == 0 && *last == args.num_boxes && std::is_sorted(first, last + 1),
        "assign_targets: gt_offsets must rise from 0 to the number of boxes, ", args.num_boxes);
    cpu::assign_targets(args, parallel_for);
  }

  void run(const Losses& args) {
    const LossScale &focal = args.focal.scale, &box = args.box.box_scale;
    const LossScale& quality = args.box.quality_scale;
    bool is_double = args.focal.dtype == DType::kDouble || args.box.dtype == DType::kDouble;
    if (args.is_saved && (is_double ? all_upstream_are_one<double>(focal, box, quality)
                                    : all_upstream_are_one<float>(focal, box, quality))) {
      return; // the saved gradients are correct
    }
    if (args.focal.logits.num_levels > 0) {
      run(args.focal);
    }
    if (args.box.ltrb.num_levels > 0 && args.wants_loss) {
      cpu::box_loss(args.box, parallel_for);
    }
    if (args.box.ltrb.num_levels > 0 && args.wants_gradient) {
      cpu::box_loss_backward(args.box, parallel_for);
    }
  }

  void run(const FocalLoss& args) {
    STD_TORCH_CHECK(
        all_within(args.labels, args.num_images * args.num_points, -1, args.num_classes),
        "sigmoid_focal_loss: labels must lie in [-1, ", args.num_classes, "]: -1 is ignored, ",
        args.num_classes, " is background");
    cpu::sigmoid_focal_loss(args, parallel_for);
  }

  void run(const SelectCandidates& args) { cpu::select_candidates(args, parallel_for); }

  void run(const PaddedNms& args) { cpu::batched_nms_padded(args, parallel_for); }

  static Tensor batched_nms(
      const Tensor& given_boxes, const Tensor& given_scores, const Tensor& given_groups,
      double iou_threshold) {
    Tensor boxes = torch::stable::contiguous(torch::stable::to(given_boxes, ScalarType::Float));
    Tensor scores = torch::stable::contiguous(torch::stable::to(given_scores, ScalarType::Double));
    Tensor groups = torch::stable::contiguous(given_groups);
    std::vector<int64_t> kept = cpu::batched_nms(
        boxes.const_data_ptr<float>(), scores.const_data_ptr<double>(),
        groups.const_data_ptr<int64_t>(), boxes.size(0), float(iou_threshold));
    int64_t* data;
    Tensor out = output(boxes, {int64_t(kept.size())}, data);
    std::copy(kept.begin(), kept.end(), data);
    return out;
  }
};

// Returns how this library was built, as JSON.
std::string build_info() {
  return "{\"torch\": \"" TORCH_VERSION "\", \"compiler\": \"" __VERSION__
         "\", \"cxx_standard\": " +
         std::to_string(__cplusplus) + "}";
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fcos_d2, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fcos_d2, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

STABLE_TORCH_LIBRARY_IMPL(fcos_d2, CPU, m) { Ops<Cpu>::register_in(m); }
