// The CUDA half of the binding, the twin of cpu.cpp: checks, allocates, launches, registers.
//
// Shapes and dtypes were checked by the Python wrappers, and what only the data can tell is checked
// in the kernels, so that nothing waits for the device. All memory comes from torch, all work goes
// to the current stream of the device of the tensors.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cuda/assign_targets.h"
#include "../cuda/box_loss.h"
#include "../cuda/sigmoid_focal_loss.h"

// tests/emulation registers these functions for other tensors, under another name.
#ifndef FCOS_D2_NAMESPACE
#define FCOS_D2_NAMESPACE fcos_d2
#define FCOS_D2_DISPATCH_KEY CUDA
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using namespace fcos;

// Makes the device of a tensor the current one, for as long as it lives.
struct Device {
  DeviceGuard guard;
  cudaStream_t stream;

  explicit Device(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
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

// The dispatcher made sure that one tensor is on the GPU; a kernel needs all of them there.
void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(
      tensor.device() == first.device(), op, ": expected all tensors on one device, but ", name,
      " is on another");
}

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// ---- lists of maps ----

cuda::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return cuda::DType::kFloat;
    case ScalarType::Half:
      return cuda::DType::kHalf;
    case ScalarType::BFloat16:
      return cuda::DType::kBFloat16;
    case ScalarType::Double:
      return cuda::DType::kDouble;
    default:
      STD_TORCH_CHECK(false, "fcos_d2: expected float32, float16, bfloat16 or float64 maps");
  }
}

ScalarType loss_dtype(const Tensor& map) {
  return map.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The gradient of a loss is read on the device, so it must be what the loss was.
void check_grad(const char* op, const char* name, const Tensor& grad, const Tensor& map) {
  check_device(op, name, grad, map);
  STD_TORCH_CHECK(
      grad.numel() == 1 && grad.scalar_type() == loss_dtype(map), op, ": ", name,
      " must be one number of the dtype of the loss");
}

// Whether the points of a [B, C, H, W] map lie at equal distances: NCHW, channels_last, and more.
bool has_point_stride(const Tensor& map) {
  return map.size(2) <= 1 || map.size(3) <= 1 || map.stride(2) == map.size(3) * map.stride(3);
}

cuda::Layout layout_of(const Tensor& map) {
  auto stride = [&](int dim) { return map.size(dim) > 1 ? map.stride(dim) : 0; };
  return {stride(0), stride(1), map.size(3) > 1 ? map.stride(3) : stride(2)};
}

// One [B, C, H, W] tensor per level, read and written where it lies. Only a map whose points do not
// lie at equal distances is copied.
class Maps {
 public:
  Maps(const char* op, const char* name, const std::vector<Tensor>& maps) : given_(maps) {
    STD_TORCH_CHECK(
        !maps.empty() && maps.size() <= kMaxLevels, op, ": ", name, " must have 1 to ", kMaxLevels,
        " levels, got ", maps.size());
    for (const Tensor& map : maps) {
      check_device(op, name, map, maps[0]);
      read_.push_back(has_point_stride(map) ? map : torch::stable::contiguous(map));
    }
  }

  // Makes room for gradients of the layout of torch.empty_like.
  void add_grads() {
    for (const Tensor& map : given_) {
      grads_.push_back(torch::stable::empty_like(map));
      bool in_place = has_point_stride(grads_.back());
      written_.push_back(in_place ? grads_.back() : torch::stable::contiguous(grads_.back()));
    }
  }

  std::vector<Tensor> take_grads() {
    for (size_t l = 0; l < grads_.size(); ++l) {
      if (!has_point_stride(grads_[l])) {
        torch::stable::copy_(grads_[l], written_[l]);
      }
    }
    return std::move(grads_);
  }

  cuda::Maps describe() const {
    cuda::Maps out{};
    out.num_levels = int(read_.size());
    int64_t first_point = 0;
    for (int l = 0; l < out.num_levels; ++l) {
      cuda::Map& map = out.level[l];
      map.data = read_[l].const_data_ptr();
      map.data_layout = layout_of(read_[l]);
      if (!written_.empty()) {
        map.grad = written_[l].mutable_data_ptr();
        map.grad_layout = layout_of(written_[l]);
      }
      map.num_points = int(read_[l].size(2) * read_[l].size(3));
      map.first_point = first_point;
      first_point += map.num_points;
    }
    return out;
  }

  const Tensor& first() const { return given_[0]; }

 private:
  std::vector<Tensor> given_, read_;
  std::vector<Tensor> grads_, written_;
};

// ---- assign_targets ----

Levels make_levels(
    const std::vector<int64_t>& shapes, const std::vector<int64_t>& strides,
    const std::vector<int64_t>& pitches, double offset) {
  STD_TORCH_CHECK(
      strides.size() <= kMaxLevels, "assign_targets: expected at most ", kMaxLevels,
      " levels, got ", strides.size());
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> assign_targets(
    const Tensor& gt_boxes, const Tensor& gt_classes, const Tensor& gt_offsets,
    std::vector<int64_t> shapes, std::vector<int64_t> strides, std::vector<int64_t> pitches,
    double offset, std::vector<double> size_ranges, int64_t num_classes, double center_radius,
    bool inclusive) {
  const char* op = "assign_targets";
  check_device(op, "gt_classes", gt_classes, gt_boxes);
  check_device(op, "gt_offsets", gt_offsets, gt_boxes);
  Device device(gt_boxes);
  Tensor boxes = torch::stable::contiguous(gt_boxes);
  Tensor classes = torch::stable::contiguous(gt_classes);
  Tensor offsets = torch::stable::contiguous(gt_offsets);
  cuda::AssignTargets args{};
  args.levels = make_levels(shapes, strides, pitches, offset);
  args.num_images = offsets.numel() - 1;
  int64_t b = args.num_images, p = args.levels.num_points;
  Tensor labels = empty(boxes, {b, p}, ScalarType::Int);
  Tensor matched = empty(boxes, {b, p}, ScalarType::Int);
  Tensor ltrb = empty(boxes, {b, p, 4}, ScalarType::Float);
  Tensor centerness = empty(boxes, {b, p}, ScalarType::Float);
  Tensor counts = empty(boxes, {b, args.levels.count, 2}, ScalarType::Int);
  args.boxes = boxes.const_data_ptr<float>();
  args.classes = classes.const_data_ptr<int64_t>();
  args.offsets = offsets.const_data_ptr<int64_t>();
  args.num_boxes = int(boxes.size(0));
  for (int l = 0; l < args.levels.count; ++l) {
    args.ranges[l] = {float(size_ranges[2 * l]), float(size_ranges[2 * l + 1]), inclusive};
  }
  args.center_radius = center_radius > 0 ? float(center_radius) : -1;
  args.num_classes = int(num_classes);
  args.labels = labels.mutable_data_ptr<int32_t>();
  args.matched = matched.mutable_data_ptr<int32_t>();
  args.ltrb = static_cast<float4*>(ltrb.mutable_data_ptr());
  args.centerness = centerness.mutable_data_ptr<float>();
  args.counts = counts.mutable_data_ptr<int32_t>();
  check_launch(op, cuda::launch_assign_targets(args, device.stream));
  return {labels, matched, ltrb, centerness, counts};
}

// ---- sigmoid_focal_loss ----

cuda::FocalLoss focal_args(
    const Maps& logits, const Tensor& labels, double alpha, double gamma) {
  cuda::FocalLoss args{};
  args.logits = logits.describe();
  args.dtype = dtype_of(logits.first());
  args.num_images = labels.size(0), args.num_points = labels.size(1);
  args.num_classes = int(logits.first().size(1));
  args.labels = labels.const_data_ptr<int32_t>();
  args.alpha = alpha, args.gamma = gamma;
  return args;
}

Tensor sigmoid_focal_loss(
    std::vector<Tensor> logits, const Tensor& given_labels, double alpha, double gamma) {
  const char* op = "sigmoid_focal_loss";
  Maps maps(op, "logits", logits);
  check_device(op, "labels", given_labels, logits[0]);
  Device device(logits[0]);
  Tensor labels = torch::stable::contiguous(given_labels);
  cuda::FocalLoss args = focal_args(maps, labels, alpha, gamma);
  int64_t num_partials = cuda::focal_loss_partials(args);
  Tensor partials = empty(logits[0], {std::max<int64_t>(num_partials, 0)}, ScalarType::Double);
  Tensor loss = empty(logits[0], {}, loss_dtype(logits[0]));
  args.partials = partials.mutable_data_ptr<double>();
  args.loss = loss.mutable_data_ptr();
  check_launch(op, cuda::launch_sigmoid_focal_loss(args, device.stream));
  return loss;
}

std::vector<Tensor> sigmoid_focal_loss_backward(
    const Tensor& grad, std::vector<Tensor> logits, const Tensor& given_labels, double alpha,
    double gamma) {
  const char* op = "sigmoid_focal_loss_backward";
  Maps maps(op, "logits", logits);
  check_device(op, "labels", given_labels, logits[0]);
  check_grad(op, "grad", grad, logits[0]);
  Device device(logits[0]);
  maps.add_grads();
  Tensor labels = torch::stable::contiguous(given_labels);
  cuda::FocalLoss args = focal_args(maps, labels, alpha, gamma);
  args.grad = grad.const_data_ptr();
  check_launch(op, cuda::launch_sigmoid_focal_loss_backward(args, device.stream));
  return maps.take_grads();
}

// ---- box_loss ----

struct BoxTargets {
  Tensor matched, ltrb, centerness;

  BoxTargets(
      const char* op, const Tensor& map, const Tensor& matched, const Tensor& ltrb,
      const Tensor& centerness)
      : matched(torch::stable::contiguous(matched)),
        ltrb(torch::stable::contiguous(ltrb)),
        centerness(torch::stable::contiguous(centerness)) {
    check_device(op, "matched", matched, map);
    check_device(op, "target_ltrb", ltrb, map);
    check_device(op, "target_centerness", centerness, map);
  }
};

LossType loss_type_of(const std::string& name) {
  const char* names[] = {"iou", "linear_iou", "giou", "diou", "ciou"};
  auto found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), "box_loss: unknown loss_type ", name);
  return LossType(found - std::begin(names));
}

cuda::BoxLossArgs box_args(
    const Maps& ltrb, const Maps& quality, const BoxTargets& targets,
    const std::string& loss_type, const std::string& quality_type, bool weight_by_centerness,
    const std::vector<double>& smoothing) {
  cuda::BoxLossArgs args{};
  args.ltrb = ltrb.describe(), args.quality = quality.describe();
  args.dtype = dtype_of(ltrb.first());
  args.num_images = targets.matched.size(0), args.num_points = targets.matched.size(1);
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
  const char* op = "box_loss";
  Maps ltrb_maps(op, "ltrb", ltrb), quality_maps(op, "quality", quality);
  Device device(ltrb[0]);
  BoxTargets targets(op, ltrb[0], matched, target_ltrb, target_centerness);
  cuda::BoxLossArgs args = box_args(
      ltrb_maps, quality_maps, targets, loss_type, quality_type, weight_by_centerness, smoothing);
  Tensor partials = empty(ltrb[0], {2, cuda::box_loss_partials(args)}, ScalarType::Double);
  Tensor box = empty(ltrb[0], {}, loss_dtype(ltrb[0]));
  Tensor quality_loss = empty(ltrb[0], {}, loss_dtype(ltrb[0]));
  args.partials = partials.mutable_data_ptr<double>();
  args.box_loss = box.mutable_data_ptr(), args.quality_loss = quality_loss.mutable_data_ptr();
  check_launch(op, cuda::launch_box_loss(args, device.stream));
  return {box, quality_loss};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> box_loss_backward(
    const Tensor& grad_box, const Tensor& grad_quality, std::vector<Tensor> ltrb,
    std::vector<Tensor> quality, const Tensor& matched, const Tensor& target_ltrb,
    const Tensor& target_centerness, std::string loss_type, std::string quality_type,
    bool weight_by_centerness, std::vector<double> smoothing) {
  const char* op = "box_loss_backward";
  Maps ltrb_maps(op, "ltrb", ltrb), quality_maps(op, "quality", quality);
  check_grad(op, "grad_box", grad_box, ltrb[0]);
  check_grad(op, "grad_quality", grad_quality, ltrb[0]);
  Device device(ltrb[0]);
  BoxTargets targets(op, ltrb[0], matched, target_ltrb, target_centerness);
  ltrb_maps.add_grads(), quality_maps.add_grads();
  cuda::BoxLossArgs args = box_args(
      ltrb_maps, quality_maps, targets, loss_type, quality_type, weight_by_centerness, smoothing);
  args.grad_box = grad_box.const_data_ptr(), args.grad_quality = grad_quality.const_data_ptr();
  check_launch(op, cuda::launch_box_loss_backward(args, device.stream));
  return {ltrb_maps.take_grads(), quality_maps.take_grads()};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(FCOS_D2_NAMESPACE, FCOS_D2_DISPATCH_KEY, m) {
  m.impl("assign_targets", TORCH_BOX(&assign_targets));
  m.impl("sigmoid_focal_loss", TORCH_BOX(&sigmoid_focal_loss));
  m.impl("sigmoid_focal_loss_backward", TORCH_BOX(&sigmoid_focal_loss_backward));
  m.impl("box_loss", TORCH_BOX(&box_loss));
  m.impl("box_loss_backward", TORCH_BOX(&box_loss_backward));
}
