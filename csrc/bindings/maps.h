// Lists of maps [B, C, H, W] as torch has them, read and written where they lie.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../core/arguments.h"

namespace [[gnu::visibility("hidden")]] fcos { // as torch's stable Tensor is

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kDouble;
    default:
      STD_TORCH_CHECK(false, "fcos_d2: expected float32, float16, bfloat16 or float64 maps");
  }
}

// Of the loss of such maps.
inline ScalarType loss_dtype(const Tensor& map) {
  return map.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// Contiguous, and aligned for loads of four numbers at once. A part of a tensor need not be.
inline Tensor contiguous_boxes(const Tensor& boxes) {
  Tensor out = torch::stable::contiguous(boxes);
  bool is_aligned = reinterpret_cast<uintptr_t>(out.const_data_ptr()) % (4 * sizeof(float)) == 0;
  return is_aligned ? out : torch::stable::clone(out);
}

// The dispatcher made sure that one tensor is on its device; a kernel needs all of them there.
inline void check_device(
    const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(
      tensor.device() == first.device(), op, ": expected all tensors on one device, but ", name,
      " is on another");
}

// Whether the points of a map lie at equal distances: NCHW, channels_last, and more.
inline bool has_point_stride(const Tensor& map) {
  return map.size(2) <= 1 || map.size(3) <= 1 || map.stride(2) == map.size(3) * map.stride(3);
}

inline Layout layout_of(const Tensor& map) {
  auto stride = [&](int dim) { return map.size(dim) > 1 ? map.stride(dim) : 0; };
  return {stride(0), stride(1), map.size(3) > 1 ? map.stride(3) : stride(2)};
}

// Whether the kernels can walk a map and its gradient as they lie. Both have point strides.
using CanWalk = bool (*)(const Tensor& map, const Tensor& grad);

// One tensor per level. Only what the kernels cannot walk is copied.
class TensorMaps {
 public:
  TensorMaps(const char* op, const char* name, const std::vector<Tensor>& maps, CanWalk can_walk)
      : given_(maps), can_walk_(can_walk) {
    STD_TORCH_CHECK(
        !maps.empty() && maps.size() <= kMaxLevels, op, ": ", name, " must have 1 to ", kMaxLevels,
        " levels, got ", maps.size());
    for (const Tensor& map : maps) {
      check_device(op, name, map, maps[0]);
      bool in_place = has_point_stride(map) && can_walk(map, map);
      read_.push_back(in_place ? map : torch::stable::contiguous(map));
    }
  }

  // Makes room for gradients of the layout of torch.empty_like.
  void add_grads() {
    std::vector<Tensor> grads;
    for (const Tensor& map : given_) {
      grads.push_back(torch::stable::empty_like(map));
    }
    write_to(std::move(grads));
  }

  // Takes tensors for the gradients.
  void write_to(std::vector<Tensor> grads) {
    grads_ = std::move(grads);
    for (size_t l = 0; l < grads_.size(); ++l) {
      bool in_place = has_point_stride(grads_[l]) && can_walk_(read_[l], grads_[l]);
      if (!in_place) {
        read_[l] = torch::stable::contiguous(read_[l]);
      }
      written_.push_back(in_place ? grads_[l] : torch::stable::contiguous(grads_[l]));
    }
  }

  void zero_grads() {
    for (Tensor& grad : written_) {
      torch::stable::zero_(grad);
    }
  }

  // After the kernels.
  std::vector<Tensor> take_grads() {
    for (size_t l = 0; l < grads_.size(); ++l) {
      if (written_[l].get() != grads_[l].get()) {
        torch::stable::copy_(grads_[l], written_[l]);
      }
    }
    return std::move(grads_);
  }

  Maps describe() const {
    Maps out{};
    out.num_levels = int(read_.size());
    int64_t first_point = 0;
    for (int l = 0; l < out.num_levels; ++l) {
      Map& map = out.level[l];
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
  const std::vector<Tensor>& given() const { return given_; }

 private:
  std::vector<Tensor> given_, read_;
  std::vector<Tensor> grads_, written_;
  CanWalk can_walk_;
};

} // namespace fcos
