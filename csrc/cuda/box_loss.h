#pragma once

#include <cuda_runtime.h>

#include "../core/arguments.h"

namespace fcos::cuda {

// How many numbers each half of `partials`, [2, box_loss_partials], holds.
int64_t box_loss_partials(const BoxLossArgs& args);
cudaError_t launch_box_loss(const BoxLossArgs& args, double* partials, cudaStream_t stream);
cudaError_t launch_box_loss_backward(const BoxLossArgs& args, cudaStream_t stream);

} // namespace fcos::cuda
