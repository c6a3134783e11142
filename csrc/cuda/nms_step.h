// Shared by both forms of batched_nms: a step of 64 boxes, which are compared with each other.
#pragma once

#include <cuda_runtime.h>

#include "../core/ranking.h"
#include "../core/scores.h"
#include "block.h"
#include "launch.h"

namespace fcos::cuda {

constexpr int kStep = 64; // boxes that are processed together
constexpr unsigned kGroups = 256;

// Sets of boxes of a step: bit i stands for box i.
constexpr uint64_t kAllBoxes = ~uint64_t(0);

__device__ uint64_t first_boxes(int count) {
  return count < kStep ? ~(kAllBoxes << count) : kAllBoxes;
}

// A lane is responsible for the boxes `lane` and `lane + 32`.
__device__ uint64_t ballot(bool first, bool second) {
  uint64_t low = __ballot_sync(kAllLanes, first);
  return uint64_t(__ballot_sync(kAllLanes, second)) << 32 | low;
}

__device__ float4 add_extent(float4 box, float pixel_extent) {
  return make_float4(box.x, box.y, box.z + pixel_extent, box.w + pixel_extent);
}

// The boxes of a step.
struct Step {
  float4 box[kStep];
  float area[kStep];
  int64_t group[kStep];
  uint64_t suppressors[kStep];           // those that overlap a box and come before it
  unsigned long long of_groups[kGroups]; // boxes; groups may share an entry

  __device__ unsigned long long& rivals(int64_t of_group) {
    return of_groups[unsigned(of_group) % kGroups];
  }
  template <int Threads>
  __device__ void clear() {
    for (unsigned i = threadIdx.x; i < kGroups; i += Threads) {
      of_groups[i] = 0;
    }
    __syncthreads();
  }
  __device__ void set(int i, float4 value, int64_t of_group) {
    box[i] = value;
    area[i] = fcos::area(&value.x);
    group[i] = of_group;
    atomicOr(&rivals(of_group), 1ull << i);
  }
  __device__ bool overlaps(int i, float4 other, float other_area, float threshold) const {
    float4 own = box[i];
    return overlap(
               other.x, other.y, other.z, other.w, other_area, own.x, own.y, own.z, own.w, area[i])
        .exceeds(threshold);
  }
};

// Which of these boxes of a step, bit i for box `first` + i, are of this group and overlap this box.
__device__ unsigned find_hits(
    const Step& step, unsigned boxes, int first, int64_t group, float4 box, float box_area,
    float threshold) {
  unsigned hits = 0;
  for (; boxes != 0; boxes &= boxes - 1) {
    int bit = __ffs(int(boxes)) - 1, i = first + bit;
    bool hit = step.group[i] == group && step.overlaps(i, box, box_area, threshold);
    hits |= unsigned(hit) << bit;
  }
  return hits;
}

// Ends with a barrier.
template <int Threads>
__device__ void find_suppressors(Step& step, int count, float threshold) {
  constexpr int kThreadsEach = Threads / kStep, kBits = kStep / kThreadsEach;
  using Part = std::conditional_t<kBits == 8, uint8_t, uint16_t>;
  static_assert(8 * sizeof(Part) == kBits);
  int j = int(threadIdx.x) / kThreadsEach, part = int(threadIdx.x) % kThreadsEach;
  if (j < count) {
    uint64_t rivals = first_boxes(j) & step.rivals(step.group[j]);
    unsigned boxes = Part(rivals >> (part * kBits));
    reinterpret_cast<Part*>(&step.suppressors[j])[part] = Part(
        find_hits(step, boxes, part * kBits, step.group[j], step.box[j], step.area[j], threshold));
  }
  __syncthreads();
}

// Which of the candidates, boxes that no earlier step suppresses, are kept. Each warp that calls it
// computes the result itself.
__device__ uint64_t resolve(const Step& step, uint64_t candidates) {
  auto suppressors = [&](int i) { return candidates >> i & 1 ? step.suppressors[i] : 0; };
  uint64_t of_first = suppressors(lane_index()), of_second = suppressors(lane_index() + 32);
  // Every turn decides one more link of each chain of overlapping boxes.
  for (uint64_t kept = candidates;;) {
    uint64_t next = candidates & ballot(!(of_first & kept), !(of_second & kept));
    if (next == kept) {
      return kept;
    }
    kept = next;
  }
}

} // namespace fcos::cuda
