// The CPU kernels: plain pointers in, plain pointers out. No torch.
//
// Kernels split their work into pieces that do not depend on the number of threads and add partial
// sums in a fixed order, so results are bitwise identical on any number of threads.
#pragma once

#include <functional>
#include <vector>

#include "../core/arguments.h"
#include "numbers.h"

namespace fcos::cpu {

// Calls task(first, last) on disjoint ranges that cover [0, count), in parallel if there are more
// than `grain` items.
using Task = std::function<void(int64_t first, int64_t last)>;
using ParallelFor = void (*)(int64_t count, int64_t grain, const Task& task);

// Whether points are contiguous. If not, channels are, since the bindings copy all other maps.
inline bool points_are_neighbors(const Map& map) {
  return map.num_points <= 1 ||
         (map.data_strides.point == 1 && (map.grad == nullptr || map.grad_strides.point == 1));
}

void assign_targets(const AssignTargets& args, ParallelFor parallel_for);

// Computes the loss unless `loss` is null, and the gradients unless `grad` of the maps is null.
void sigmoid_focal_loss(const FocalLoss& args, ParallelFor parallel_for);

void box_loss(const BoxLosses& args, ParallelFor parallel_for);
void box_loss_backward(const BoxLosses& args, ParallelFor parallel_for);

void select_candidates(const SelectCandidates& args, ParallelFor parallel_for);

void batched_nms_padded(const PaddedNms& args, ParallelFor parallel_for);

// Returns the indices of kept boxes, by descending score.
std::vector<int64_t> batched_nms(
    const float* boxes, const double* scores, const int64_t* groups, int64_t num_boxes,
    float iou_threshold);

} // namespace fcos::cpu
