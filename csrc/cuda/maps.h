// Lists of [B, C, H, W] maps as kernels see them: pointers and strides, whatever the memory format.
#pragma once

#include "../core/levels.h"

namespace fcos::cuda {

enum class DType { kFloat, kHalf, kBFloat16, kDouble };

// Strides in elements. Point p (row-major) and channel c of image b is element
// b * image + c * channel + p * point. A dimension of size 1 has stride 0.
struct Layout {
  int64_t image, channel, point;
};

// One level.
struct Map {
  const void* data;
  void* grad; // null in a forward pass
  Layout data_layout, grad_layout;
  int num_points;
  int64_t first_point; // of this level among the P points
};

struct Maps {
  int num_levels;
  Map level[kMaxLevels];
};

} // namespace fcos::cuda
