// The CUDA kernels: plain pointers in, plain pointers out. No torch.
//
// A launch_<op> queues its kernels on a stream and returns the launch error. The caller provides its
// working memory; the function before it returns the size.
#pragma once

#include <cuda_runtime.h>

#include "../core/arguments.h"

namespace fcos::cuda {

// How many numbers `state` must hold.
int64_t assign_targets_state(const AssignTargets& args);
cudaError_t launch_assign_targets(const AssignTargets& args, double* state, cudaStream_t stream);

// How many numbers `partials` must hold.
int64_t fcos_loss_partials(const Losses& args);
cudaError_t launch_fcos_loss(const Losses& args, double* partials, cudaStream_t stream);

// How many 64-bit numbers `memory` must hold.
int64_t select_candidates_memory(const SelectCandidates& args);
cudaError_t launch_select_candidates(
    const SelectCandidates& args, uint64_t* memory, cudaStream_t stream);

// How many floats `scores` must hold: soft-NMS lowers them there.
int64_t batched_nms_padded_scores(const PaddedNms& args);
cudaError_t launch_batched_nms_padded(const PaddedNms& args, float* scores, cudaStream_t stream);

// N boxes, sorted by group, then by descending score.
struct FlatNms {
  const float* boxes;    // [N, 4], in any order, aligned to 16 bytes
  const int64_t* index;  // [N], the row of `boxes` at each position of the sorted order
  const int64_t* groups; // [N], ascending
  const int64_t* place;  // [N], the element of `keep` for each position
  int64_t num_boxes;
  float iou_threshold;
  bool* keep; // [N]
};

// How many 64-bit numbers `state` must hold.
int64_t batched_nms_state(const FlatNms& args);
cudaError_t launch_batched_nms(const FlatNms& args, uint64_t* state, cudaStream_t stream);

} // namespace fcos::cuda
