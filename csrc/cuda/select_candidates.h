#pragma once

#include <cuda_runtime.h>

#include "../core/arguments.h"

namespace fcos::cuda {

// How many 32-bit numbers `state` must hold.
int64_t select_candidates_state(const SelectCandidates& args);
cudaError_t launch_select_candidates(
    const SelectCandidates& args, unsigned* state, cudaStream_t stream);

} // namespace fcos::cuda
