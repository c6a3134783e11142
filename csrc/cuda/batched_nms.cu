// batched_nms: boxes are taken by descending score, 64 at a time, and compared with those kept before
// and with each other. Classes are compared, never shifted apart, and there is no N x N anything.
//
// padded_kernel has a block per image. It sorts no more boxes than it must: the best few hundred, and
// the next only when these have not filled the D slots. The slots themselves are the list of kept
// boxes.
//
// flat_kernel has a block per 64 boxes, which waits for those before it of the same group. All that
// blocks tell each other is one word, so nothing depends on the order in which memory is written.
//
// soft_kernel has a block per image, which lowers all scores each time it has kept a box.

#include "batched_nms.h"

#include "../core/ranking.h"
#include "../core/scores.h"
#include "block.h"
#include "launch.h"

namespace fcos::cuda {
namespace {

constexpr int kStep = 64; // boxes that are taken together
constexpr int kPaddedThreads = 512, kFlatThreads = 256;
constexpr unsigned kWanted = 512, kSortable = 1024; // boxes sorted at a time: at least, at most

// The boxes of a step.
struct Step {
  float4 box[kStep];
  float area[kStep];
  int64_t group[kStep];
  unsigned suppressors[kStep][2]; // bit i: box i overlaps it and comes before it
  unsigned suppressed[2];         // by boxes of earlier steps
  unsigned kept[2];

  __device__ bool is_kept(int i) const { return kept[i / 32] >> (i % 32) & 1; }
  __device__ int num_kept_before(int i) const {
    unsigned below = (1u << (i % 32)) - 1;
    return __popc(kept[i / 32] & below) + (i >= 32 ? __popc(kept[0]) : 0);
  }
  __device__ int num_kept() const { return __popc(kept[0]) + __popc(kept[1]); }

  __device__ void set(int i, float4 value, int64_t of_group) {
    box[i] = value;
    area[i] = fcos::area(&value.x);
    group[i] = of_group;
  }
  __device__ bool overlaps(int i, float4 other, float other_area, float threshold) const {
    float4 own = box[i];
    return overlap(
               other.x, other.y, other.z, other.w, other_area, own.x, own.y, own.z, own.w, area[i])
        .exceeds(threshold);
  }
};

// Finds out which of the `count` boxes of a step are kept, when `suppressed` is known.
template <int Threads>
__device__ void resolve(Step& step, int count, float threshold) {
  int lane = lane_index();
  for (int j = int(threadIdx.x) / 32; j < count; j += Threads / 32) {
    for (int half = 0; half < 2; ++half) {
      int i = half * 32 + lane;
      bool hit = i < j && step.group[i] == step.group[j] &&
                 step.overlaps(i, step.box[j], step.area[j], threshold);
      unsigned hits = __ballot_sync(kAllLanes, hit);
      if (lane == 0) {
        step.suppressors[j][half] = hits;
      }
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) { // a lane has the boxes `lane` and `lane + 32`
    bool can_first = lane < count && !(step.suppressed[0] >> lane & 1);
    bool can_second = lane + 32 < count && !(step.suppressed[1] >> lane & 1);
    unsigned of_first = can_first ? step.suppressors[lane][0] : 0;
    unsigned of_second[2] = {};
    if (can_second) {
      of_second[0] = step.suppressors[lane + 32][0], of_second[1] = step.suppressors[lane + 32][1];
    }
    unsigned first = __ballot_sync(kAllLanes, can_first);
    unsigned second = __ballot_sync(kAllLanes, can_second);
    // Every turn settles one more link of each chain of boxes that overlap.
    for (;;) {
      bool keep_first = can_first && !(of_first & first);
      bool keep_second = can_second && !((of_second[0] & first) | (of_second[1] & second));
      unsigned next_first = __ballot_sync(kAllLanes, keep_first);
      unsigned next_second = __ballot_sync(kAllLanes, keep_second);
      if (next_first == first && next_second == second) {
        break;
      }
      first = next_first, second = next_second;
    }
    if (lane == 0) {
      step.kept[0] = first, step.kept[1] = second;
    }
  }
  __syncthreads();
}

// ---- the padded form ----

struct PaddedScratch {
  uint64_t keys[kSortable];
  unsigned bins[kBins];
  unsigned of_warps[kPaddedThreads / 32];
  Bin found;
  unsigned count;
  Step step;
};

struct Image {
  const float4* boxes;
  const float* scores;
  const int64_t* classes;
  float4* kept_boxes;
  float* kept_scores;
  int64_t* kept_classes;

  __device__ Image(const PaddedNms& args, int64_t image)
      : boxes(reinterpret_cast<const float4*>(args.boxes) + image * args.num_boxes),
        scores(args.scores + image * args.num_boxes),
        classes(args.classes + image * args.num_boxes),
        kept_boxes(reinterpret_cast<float4*>(args.kept_boxes) + image * args.max_detections),
        kept_scores(args.kept_scores + image * args.max_detections),
        kept_classes(args.kept_classes + image * args.max_detections) {}

  // 0 for a box that cannot be kept.
  __device__ uint64_t key(int64_t i) const {
    bool valid = classes[i] >= 0 && scores[i] > -INFINITY; // false for NaN
    return valid ? ranking_key(ordered_bits(scores[i]), uint32_t(i)) : 0;
  }
  __device__ void keep(int64_t slot, int64_t i, float score) const {
    kept_boxes[slot] = boxes[i];
    kept_scores[slot] = score;
    kept_classes[slot] = classes[i];
  }
};

// Fills the slots from `count` on with nothing.
template <int Threads>
__device__ void finish(const PaddedNms& args, int64_t image, int64_t count) {
  Image at(args, image);
  for (int64_t slot = count + threadIdx.x; slot < args.max_detections; slot += Threads) {
    at.kept_boxes[slot] = make_float4(0, 0, 0, 0);
    at.kept_scores[slot] = 0;
    at.kept_classes[slot] = -1;
  }
  if (threadIdx.x == 0) {
    args.counts[image] = int32_t(count);
  }
}

// Calls take(valid, key) for all boxes whose key is in the range.
template <int Threads, class Take>
__device__ void for_each_key(const Image& image, int64_t num_boxes, Range range, Take&& take) {
  for (int64_t first = 0; first < num_boxes; first += Threads) {
    int64_t i = first + threadIdx.x;
    uint64_t key = i < num_boxes ? image.key(i) : 0;
    take(range.contains(key), key);
  }
  __syncthreads();
}

// The least key of the best boxes below `high`: of kWanted to kSortable, or of all there are.
__device__ uint64_t
find_least(const Image& image, int64_t num_boxes, uint64_t high, PaddedScratch& scratch) {
  Range range = {1, high};
  unsigned above = 0;
  for (;;) {
    int shift = range.shift();
    clear_bins<kPaddedThreads>(scratch.bins);
    for_each_key<kPaddedThreads>(image, num_boxes, range, [&](bool valid, uint64_t key) {
      count_key(valid, unsigned((key - range.low) >> shift), scratch.bins);
    });
    Bin bin =
        find_bin<kPaddedThreads>(scratch.bins, kWanted - above, scratch.of_warps, &scratch.found);
    if (bin.index < 0) {
      return range.low;
    }
    above += bin.above;
    range.high = min(range.high, range.low + (uint64_t(bin.index + 1) << shift));
    range.low += uint64_t(bin.index) << shift;
    if (above + bin.inside <= kSortable) {
      return range.low;
    }
  }
}

// Takes up to kStep boxes by their keys; returns how many are kept then.
__device__ int64_t take_step(
    const PaddedNms& args, const Image& image, const uint64_t* keys, int count, int64_t kept,
    Step& step) {
  int t = int(threadIdx.x);
  int64_t index = 0;
  if (t < count) {
    index = ranking_index(keys[t]);
    step.set(t, image.boxes[index], args.class_agnostic ? 0 : image.classes[index]);
  }
  if (t < 2) {
    step.suppressed[t] = 0;
  }
  __syncthreads();
  int i = t % kStep;
  bool suppressed = false;
  for (int64_t j = t / kStep; j < kept && i < count && !suppressed; j += kPaddedThreads / kStep) {
    if (args.class_agnostic || image.kept_classes[j] == step.group[i]) {
      float4 box = image.kept_boxes[j];
      suppressed = step.overlaps(i, box, area(&box.x), args.iou_threshold);
    }
  }
  if (suppressed) {
    atomicOr(&step.suppressed[i / 32], 1u << (i % 32));
  }
  resolve<kPaddedThreads>(step, count, args.iou_threshold); // has a barrier before it reads them
  int64_t slot = kept + (t < count ? step.num_kept_before(t) : 0);
  if (t < count && step.is_kept(t) && slot < args.max_detections) {
    image.keep(slot, index, image.scores[index]);
  }
  kept = min(kept + step.num_kept(), args.max_detections);
  __syncthreads();
  return kept;
}

__global__ void __launch_bounds__(kPaddedThreads)
    padded_kernel(const __grid_constant__ PaddedNms args) {
  __shared__ PaddedScratch scratch;
  Image image(args, blockIdx.x);
  int64_t kept = 0;
  uint64_t high = ~uint64_t(0);
  bool more = args.num_boxes > 0;
  while (more && kept < args.max_detections) {
    Range range = {find_least(image, args.num_boxes, high, scratch), high};
    if (threadIdx.x == 0) {
      scratch.count = 0;
    }
    __syncthreads();
    for_each_key<kPaddedThreads>(image, args.num_boxes, range, [&](bool valid, uint64_t key) {
      append(valid, key, scratch.keys, kSortable, &scratch.count);
    });
    int count = int(scratch.count);
    sort_descending<kPaddedThreads>(scratch.keys, unsigned(count));
    for (int first = 0; first < count && kept < args.max_detections; first += kStep) {
      int size = min(count - first, kStep);
      kept = take_step(args, image, scratch.keys + first, size, kept, scratch.step);
    }
    high = range.low;
    more = count >= int(kWanted);
  }
  finish<kPaddedThreads>(args, blockIdx.x, kept);
}

// ---- soft-NMS ----

// The score of a box after one that overlaps it was kept (1704.04503).
__device__ float lower(const PaddedNms& args, float score, const Overlap& o) {
  if (args.method == NmsMethod::kGaussian) {
    return product(score, exp_of_negative(-product(o.iou(), o.iou()) / args.sigma));
  }
  return o.exceeds(args.iou_threshold) ? product(score, 1 - o.iou()) : score;
}

__global__ void __launch_bounds__(kPaddedThreads)
    soft_kernel(const __grid_constant__ PaddedNms args, float* all_scores) {
  __shared__ uint64_t of_warps[kPaddedThreads / 32];
  Image image(args, blockIdx.x);
  float* scores = all_scores + blockIdx.x * args.num_boxes; // a thread sees only its own
  uint64_t best = 0;
  for (int64_t i = threadIdx.x; i < args.num_boxes; i += kPaddedThreads) {
    uint64_t key = image.key(i);
    scores[i] = key > 0 ? image.scores[i] : -INFINITY;
    best = max(best, key);
  }
  int64_t kept = 0;
  while (kept < args.max_detections) {
    best = largest<kPaddedThreads>(best, of_warps);
    if (best == 0) {
      break;
    }
    int64_t index = ranking_index(best);
    float4 box = image.boxes[index];
    int64_t label = image.classes[index];
    best = 0;
    for (int64_t i = threadIdx.x; i < args.num_boxes; i += kPaddedThreads) {
      float score = scores[i];
      if (i == index) {
        image.keep(kept, i, score);
        score = -INFINITY;
      } else if (score > -INFINITY && (args.class_agnostic || image.classes[i] == label)) {
        float4 other = image.boxes[i];
        score = lower(args, score, overlap(&box.x, &other.x));
      }
      scores[i] = score = score > args.min_score ? score : -INFINITY; // -inf for NaN
      if (score > -INFINITY) {
        best = max(best, ranking_key(ordered_bits(score), uint32_t(i)));
      }
    }
    ++kept;
  }
  finish<kPaddedThreads>(args, blockIdx.x, kept);
}

// ---- the flat form ----

constexpr uint64_t kReady = uint64_t(1) << 32; // beside 32 bits that say which boxes were kept

struct FlatScratch {
  Step step, earlier;
  int64_t turn;
};

__device__ void load_step(const FlatNms& args, int64_t first, int count, Step& step) {
  int t = int(threadIdx.x);
  if (t < count) {
    float4 box = reinterpret_cast<const float4*>(args.boxes)[args.index[first + t]];
    step.set(t, box, args.groups[first + t]);
  }
}

// Where the group of the box at `position` starts. All threads look at as many places at a time.
__device__ int64_t find_group(const FlatNms& args, int64_t position) {
  int64_t group = args.groups[position], low = 0, high = position; // it starts in [low, high]
  while (low < high) {
    int64_t distance = (high - low + kFlatThreads - 1) / kFlatThreads;
    int64_t place = low + threadIdx.x * distance;
    int smaller = __syncthreads_count(place < high && args.groups[place] < group);
    high = min(high, low + smaller * distance);
    low = smaller == 0 ? low : low + (smaller - 1) * distance + 1;
  }
  return low;
}

__device__ unsigned wait_for(const uint64_t* word) {
  uint64_t value;
  do {
    value = *static_cast<const volatile uint64_t*>(word);
  } while (!(value & kReady));
  return unsigned(value);
}

// `state` is a counter and two words for every step, all zero.
__global__ void __launch_bounds__(kFlatThreads)
    flat_kernel(const __grid_constant__ FlatNms args, uint64_t* state) {
  __shared__ FlatScratch scratch;
  Step &step = scratch.step, &earlier = scratch.earlier;
  uint64_t* words = state + 1;
  int t = int(threadIdx.x);
  if (t == 0) { // blocks start in no certain order, but who has waited for has started
    scratch.turn = int64_t(atomicAdd(reinterpret_cast<unsigned long long*>(state), 1ull));
    step.suppressed[0] = step.suppressed[1] = 0;
  }
  __syncthreads();
  int64_t turn = scratch.turn, first = turn * kStep;
  int count = int(min(args.num_boxes - first, int64_t(kStep)));
  load_step(args, first, count, step);
  int i = t % kStep;
  bool suppressed = false;
  for (int64_t s = find_group(args, first) / kStep; s < turn; ++s) {
    load_step(args, s * kStep, kStep, earlier);
    if (t < 2) {
      earlier.kept[t] = wait_for(words + 2 * s + t);
    }
    __syncthreads();
    for (int j = t / kStep; j < kStep && i < count && !suppressed; j += kFlatThreads / kStep) {
      suppressed = earlier.is_kept(j) && earlier.group[j] == step.group[i] &&
                   step.overlaps(i, earlier.box[j], earlier.area[j], args.iou_threshold);
    }
    __syncthreads();
  }
  if (suppressed) {
    atomicOr(&step.suppressed[i / 32], 1u << (i % 32));
  }
  __syncthreads();
  resolve<kFlatThreads>(step, count, args.iou_threshold);
  if (t < 2) {
    *static_cast<volatile uint64_t*>(words + 2 * turn + t) = kReady | step.kept[t];
  }
  if (t < count) {
    args.keep[args.place[first + t]] = step.is_kept(t);
  }
}

} // namespace

int64_t batched_nms_padded_scores(const PaddedNms& args) {
  return args.method == NmsMethod::kHard ? 0 : args.num_images * args.num_boxes;
}

cudaError_t launch_batched_nms_padded(const PaddedNms& args, float* scores, cudaStream_t stream) {
  if (args.num_images > kMaxBlocks || args.num_boxes > UINT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  if (args.num_images == 0) {
    return cudaSuccess;
  }
  unsigned blocks = unsigned(args.num_images);
  if (args.method == NmsMethod::kHard) {
    FCOS_LAUNCH(padded_kernel, blocks, kPaddedThreads, 0, stream, args);
  } else {
    FCOS_LAUNCH(soft_kernel, blocks, kPaddedThreads, 0, stream, args, scores);
  }
  return cudaGetLastError();
}

int64_t batched_nms_state(const FlatNms& args) { return 1 + 2 * divide_up(args.num_boxes, kStep); }

cudaError_t launch_batched_nms(const FlatNms& args, uint64_t* state, cudaStream_t stream) {
  int64_t blocks = divide_up(args.num_boxes, kStep);
  if (blocks == 0 || blocks > kMaxBlocks) {
    return blocks == 0 ? cudaSuccess : cudaErrorInvalidConfiguration;
  }
  size_t bytes = size_t(batched_nms_state(args)) * sizeof(uint64_t);
  cudaError_t error = cudaMemsetAsync(state, 0, bytes, stream);
  if (error != cudaSuccess) {
    return error;
  }
  FCOS_LAUNCH(flat_kernel, unsigned(blocks), kFlatThreads, 0, stream, args, state);
  return cudaGetLastError();
}

} // namespace fcos::cuda
