#pragma once

#include <cuda_runtime.h>

#include "../core/geometry.h"
#include "maps.h"

namespace fcos::cuda {

// B images, P points of all levels together.
struct BoxLossArgs {
  Maps ltrb;    // C = 4
  Maps quality; // C = 1
  DType dtype;
  int64_t num_images, num_points;
  const int32_t* matched;         // [B, P]
  const float* target_ltrb;       // [B, P, 4]
  const float* target_centerness; // [B, P]
  LossType loss_type;
  QualityType quality_type;
  bool weight_by_centerness;
  double smoothing[kMaxLevels];
  double* partials;         // forward: [2, box_loss_partials]
  void* box_loss;           // forward: float, or double for double maps
  void* quality_loss;       // forward: of the same type
  const void* grad_box;     // backward: of the box loss, of its type
  const void* grad_quality; // backward
};

// How many numbers each half of `partials` must hold.
int64_t box_loss_partials(const BoxLossArgs& args);
cudaError_t launch_box_loss(const BoxLossArgs& args, cudaStream_t stream);
cudaError_t launch_box_loss_backward(const BoxLossArgs& args, cudaStream_t stream);

} // namespace fcos::cuda
