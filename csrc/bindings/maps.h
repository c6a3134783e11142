// Passes torch tensors to kernels that read and write them in place, mostly lists of maps
// [B, C, H, W].
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../core/arguments.h"

namespace [[gnu::visibility("hidden")]] fcos { // like torch's stable Tensor

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;

inline DType dtype_of(const Tensor& map) {
  constexpr ScalarType kTypes[] = {
      ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double};
  auto found = std::find(std::begin(kTypes), std::end(kTypes), map.scalar_type());
  STD_TORCH_CHECK(
      found != std::end(kTypes), "fcos_d2: expected float32, float16, bfloat16 or float64 maps");
  return DType(found - kTypes);
}

// Returns the dtype of a loss of `map`.
inline ScalarType loss_dtype(const Tensor& map) {
  return map.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Makes boxes contiguous and aligned for vectorized loads of four floats, which a view may not be.
inline Tensor contiguous_boxes(const Tensor& boxes) {
  Tensor out = torch::stable::contiguous(boxes);
  bool is_aligned = reinterpret_cast<uintptr_t>(out.const_data_ptr()) % (4 * sizeof(float)) == 0;
  return is_aligned ? out : torch::stable::clone(out);
}

// The dispatcher only ensures that one tensor is on its device; kernels need all of them there.
inline void check_device(
    const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(
      tensor.device() == first.device(), op, ": expected all tensors on one device, but ", name,
      " is on another");
}

// Makes an input contiguous and points `data` at it.
template <class T>
Tensor input(
    const char* op, const char* name, const Tensor& given, const Tensor& first, const T*& data) {
  check_device(op, name, given, first);
  Tensor tensor = torch::stable::contiguous(given);
  data = tensor.const_data_ptr<T>();
  return tensor;
}

// Allocates an output on the device of `like` and points `data` at it.
template <class T>
Tensor output(const Tensor& like, Integers sizes, T*& data) {
  auto dtype = torch::headeronly::CppTypeToScalarType<T>::value;
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
  data = tensor.template mutable_data_ptr<T>();
  return tensor;
}

// Converts `name` to an enumerator of `Choice`; `names` lists them in order.
template <class Choice>
Choice choose(
    const char* op, const char* what, const std::string& name,
    std::initializer_list<const char*> names) {
  auto found = std::find(names.begin(), names.end(), name);
  STD_TORCH_CHECK(found != names.end(), op, ": unknown ", what, " ", name);
  return Choice(found - names.begin());
}

// Whether a single stride leads from each point to the next, as in NCHW and channels_last.
inline bool has_point_stride(const Tensor& map) {
  return map.size(2) <= 1 || map.size(3) <= 1 || map.stride(2) == map.size(3) * map.stride(3);
}

inline Strides strides_of(const Tensor& map) {
  auto stride = [&](int dim) { return map.size(dim) > 1 ? map.stride(dim) : 0; };
  return {stride(0), stride(1), map.size(3) > 1 ? map.stride(3) : stride(2)};
}

// One tensor per level. Only tensors whose layout the kernels do not support are copied.
template <class Device>
class TensorMaps {
 public:
  TensorMaps(const char* op, const char* name, const Tensors& maps, const Tensors& like)
      : given_(maps) {
    STD_TORCH_CHECK(
        !maps.empty() && maps.size() <= kMaxLevels, op, ": ", name, " must have 1 to ", kMaxLevels,
        " levels, got ", maps.size());
    for (const Tensor& map : maps) {
      check_device(op, name, map, like[0]);
      bool in_place = has_point_stride(map) && Device::supports_layout(map, map);
      read_.push_back(in_place ? map : torch::stable::contiguous(map));
    }
  }

  size_t size() const { return given_.size(); }

  // Requests gradients, written to `grads` or, if it is empty, to tensors from torch.empty_like.
  void write_to(Tensors grads = {}) {
    grads_ = std::move(grads);
    for (size_t l = 0; l < given_.size(); ++l) {
      if (l == grads_.size()) {
        grads_.push_back(torch::stable::empty_like(given_[l]));
      }
      bool in_place = has_point_stride(grads_[l]) && Device::supports_layout(read_[l], grads_[l]);
      if (!in_place) {
        read_[l] = torch::stable::contiguous(read_[l]);
      }
      written_.push_back(in_place ? grads_[l] : torch::stable::contiguous(grads_[l]));
    }
  }

  // Returns the gradients; call it after the kernels.
  Tensors take_grads() {
    for (size_t l = 0; l < grads_.size(); ++l) {
      if (written_[l].get() != grads_[l].get()) {
        torch::stable::copy_(grads_[l], written_[l]);
      }
    }
    return std::move(grads_);
  }

  Maps describe() const {
    Maps out{int(read_.size()), {}};
    int64_t first_point = 0;
    for (int l = 0; l < out.num_levels; ++l) {
      const Tensor& data = read_[l];
      int points = int(data.size(2) * data.size(3));
      out.level[l] = {data.const_data_ptr(), nullptr, strides_of(data), {}, points, first_point};
      if (!written_.empty()) {
        out.level[l].grad = written_[l].mutable_data_ptr();
        out.level[l].grad_strides = strides_of(written_[l]);
      }
      first_point += points;
    }
    return out;
  }

 private:
  Tensors given_, read_, grads_, written_;
};

} // namespace fcos
