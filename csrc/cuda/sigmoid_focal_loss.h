#pragma once

#include <cuda_runtime.h>

#include "../core/arguments.h"

namespace fcos::cuda {

// How many numbers `partials` must hold; negative where the maps are too large for one launch.
int64_t focal_loss_partials(const FocalLoss& args);

// The loss where `loss` is not null, gradients where `grad` is not, in one pass over the logits.
// `partials` is for the loss.
cudaError_t launch_sigmoid_focal_loss(const FocalLoss& args, double* partials, cudaStream_t stream);

} // namespace fcos::cuda
