#pragma once

#include <cuda_runtime.h>

#include "maps.h"

namespace fcos::cuda {

// B images, P points of all levels together, K classes.
struct FocalLoss {
  Maps logits; // C = K
  DType dtype;
  int64_t num_images, num_points;
  int num_classes;
  const int32_t* labels; // [B, P]
  double alpha;          // negative for no weights
  double gamma;
  double* partials; // forward: [focal_loss_partials]
  void* loss;       // forward: float, or double for double logits
  const void* grad; // backward: of the loss, of its type
};

// How many numbers `partials` must hold; negative where the maps are too large for one launch.
int64_t focal_loss_partials(const FocalLoss& args);
cudaError_t launch_sigmoid_focal_loss(const FocalLoss& args, cudaStream_t stream);
cudaError_t launch_sigmoid_focal_loss_backward(const FocalLoss& args, cudaStream_t stream);

} // namespace fcos::cuda
