#pragma once

#include <cuda_runtime.h>

#include "../core/geometry.h"

namespace fcos::cuda {

// B images, L levels, P points of all levels together, M boxes of the batch, K classes.
struct AssignTargets {
  const float* boxes;     // [M, 4]
  const int64_t* classes; // [M], -1 for a region to ignore
  const int64_t* offsets; // [B + 1]
  int num_boxes;
  int64_t num_images;
  Levels levels;
  SizeRange ranges[kMaxLevels];
  float center_radius; // in strides, negative for none
  int num_classes;
  int32_t* labels;   // [B, P]
  int32_t* matched;  // [B, P]
  float4* ltrb;      // [B, P]
  float* centerness; // [B, P]
  int32_t* counts;   // [B, L, 2]
};
cudaError_t launch_assign_targets(const AssignTargets& args, cudaStream_t stream);

} // namespace fcos::cuda
