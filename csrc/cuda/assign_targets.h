#pragma once

#include <cuda_runtime.h>

#include "../core/arguments.h"

namespace fcos::cuda {

cudaError_t launch_assign_targets(const AssignTargets& args, cudaStream_t stream);

} // namespace fcos::cuda
