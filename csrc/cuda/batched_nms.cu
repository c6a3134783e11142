// batched_nms: boxes are processed by descending score, 64 at a time, and compared with the boxes kept
// before and with each other. Classes are compared, never shifted apart, and there is no N x N matrix.
//
// padded_kernel has a block per image. It sorts no more boxes than necessary: the best few hundred, and
// the next ones only if these do not fill the D slots. Boxes stay in shared memory and are written to
// their slots at the end.
//
// flat_kernel has a block per 64 boxes. If the group of its first box begins in earlier blocks, it
// waits for them. Results for other groups are published at once, so only blocks of the same group
// wait for each other. One word says which boxes are decided and which of them are kept, so nothing
// depends on the order of memory writes.
//
// soft_kernel has a block per image, which lowers all scores each time it keeps a box.

#include "ops.h"

#include <type_traits>

#include "nms_step.h"

namespace fcos::cuda {
namespace {

constexpr int kPaddedThreads = 512, kFlatThreads = 256;
constexpr unsigned kWanted = 512, kSortable = 1024; // boxes sorted at a time: at least, at most

// ---- the padded form ----

struct PaddedScratch : Histogram<kPaddedThreads> {
  uint64_t keys[kSortable]; // of the boxes that are sorted
  float4 box[kSortable];
  int64_t group[kSortable];
  uint16_t kept[kSortable]; // which of them are kept, in the order of their slots
  Step step;
  unsigned long long suppressed; // boxes of the step
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

  // 0 for a box that cannot be kept. Starts both loads before it uses one.
  __device__ uint64_t key(int64_t i) const {
    int64_t label = classes[i];
    float score = scores[i];
    bool valid = label >= 0 && score > -INFINITY; // false for NaN
    return valid ? ranking_key(ordered_bits(score), uint32_t(i)) : 0;
  }
  // Loads before it stores: a stalled store would delay the next load.
  __device__ void keep(int64_t slot, int64_t i, float score) const {
    float4 box = boxes[i];
    int64_t label = classes[i];
    kept_boxes[slot] = box;
    kept_scores[slot] = score;
    kept_classes[slot] = label;
  }
};

// Clears the slots from `count` on.
__device__ void finish(const PaddedNms& args, int64_t image, int64_t count) {
  Image at(args, image);
  for (int64_t slot = count + threadIdx.x; slot < args.max_detections; slot += kPaddedThreads) {
    at.kept_boxes[slot] = make_float4(0, 0, 0, 0);
    at.kept_scores[slot] = 0;
    at.kept_classes[slot] = -1;
  }
  if (threadIdx.x == 0) {
    args.counts[image] = int32_t(count);
  }
}

// Sorts the best boxes with keys below `high`: enough for the missing slots, or all of them. Returns
// how many, and lowers `high` to the keys that are left.
__device__ int sort_best(
    const PaddedNms& args, const Image& image, int64_t missing, uint64_t* high,
    PaddedScratch& scratch) {
  Range range = {1, *high};
  uint64_t end = *high;
  unsigned wanted = unsigned(min(int64_t(kSortable), max(int64_t(kWanted), missing)));
  auto for_each = [&](auto&& take) { // 10 times 512 threads: 1,000 candidates of each of 5 levels
    for_each_key<kPaddedThreads, 10, false>(
        args.num_boxes, [&](int64_t i) { return image.key(i); }, take);
  };
  scratch.narrow({0, 0, unsigned(args.num_boxes)}, wanted, kSortable, &range, for_each);
  scratch.clear();
  for_each([&](bool valid, uint64_t key) {
    bool good = valid && key >= range.low && key < end;
    append(good, key, scratch.keys, kSortable, &scratch.count);
  });
  int count = int(scratch.count);
  sort_descending<kPaddedThreads>(scratch.keys, unsigned(count));
  for (int i = int(threadIdx.x); i < count; i += kPaddedThreads) {
    uint32_t index = ranking_index(scratch.keys[i]);
    scratch.box[i] = image.boxes[index], scratch.group[i] = image.classes[index];
  }
  *high = range.low;
  return count;
}

// Finds the boxes of a step that boxes kept before suppress: those in the first `old` slots and `kept`
// of the sorted ones. Two threads share one of them.
__device__ void find_suppressed(
    const PaddedNms& args, const Image& image, int64_t old, int64_t kept, PaddedScratch& scratch) {
  int half = 32 * int(threadIdx.x % 2);
  unsigned suppressed = 0;
  for (int64_t j = threadIdx.x / 2; j < old + kept; j += kPaddedThreads / 2) {
    bool is_old = j < old;
    int place = is_old ? 0 : scratch.kept[j - old];
    int64_t label = is_old ? image.kept_classes[j] : scratch.group[place];
    int64_t group = args.class_agnostic ? 0 : label;
    if (unsigned boxes = unsigned(scratch.step.rivals(group) >> half)) {
      float4 box = add_extent(is_old ? image.kept_boxes[j] : scratch.box[place], args.pixel_extent);
      suppressed |=
          find_hits(scratch.step, boxes, half, group, box, area(&box.x), args.iou_threshold);
    }
  }
  if (suppressed != 0) {
    atomicOr(&scratch.suppressed, static_cast<unsigned long long>(suppressed) << half);
  }
}

// Processes `count` sorted boxes from `first` on; returns how many sorted boxes have been kept.
__device__ int take_step(
    const PaddedNms& args, const Image& image, int first, int count, int64_t old, int kept,
    PaddedScratch& scratch) {
  int t = int(threadIdx.x);
  scratch.step.clear<kPaddedThreads>();
  if (t == 0) {
    scratch.suppressed = 0;
  }
  if (t < count) {
    int64_t group = args.class_agnostic ? 0 : scratch.group[first + t];
    scratch.step.set(t, add_extent(scratch.box[first + t], args.pixel_extent), group);
  }
  __syncthreads();
  find_suppressed(args, image, old, kept, scratch);
  find_suppressors<kPaddedThreads>(scratch.step, count, args.iou_threshold);
  uint64_t more = resolve(scratch.step, first_boxes(count) & ~scratch.suppressed);
  if (t < count && more >> t & 1) {
    scratch.kept[kept + __popcll(more & first_boxes(t))] = uint16_t(first + t);
  }
  return kept + __popcll(more);
}

__global__ void __launch_bounds__(kPaddedThreads, 2)
    padded_kernel(const __grid_constant__ PaddedNms args) {
  __shared__ PaddedScratch scratch;
  Image image(args, blockIdx.x);
  int64_t old = 0; // slots that are filled
  uint64_t high = ~uint64_t(0);
  bool more = args.num_boxes > 0;
  while (more && old < args.max_detections) {
    int count = sort_best(args, image, args.max_detections - old, &high, scratch), kept = 0;
    for (int first = 0; first < count && old + kept < args.max_detections; first += kStep) {
      kept = take_step(args, image, first, min(count - first, kStep), old, kept, scratch);
    }
    __syncthreads();
    kept = int(min(int64_t(kept), args.max_detections - old));
    for (int i = int(threadIdx.x); i < kept; i += kPaddedThreads) {
      int64_t index = ranking_index(scratch.keys[scratch.kept[i]]);
      image.keep(old + i, index, image.scores[index]);
    }
    old += kept;
    more = count >= int(kWanted);
  }
  finish(args, blockIdx.x, old);
}

// ---- soft-NMS ----

// The score of a box after an overlapping box was kept (1704.04503).
__device__ float lower(const PaddedNms& args, float score, const Overlap& o) {
  if (args.method == NmsMethod::kGaussian) {
    return mul_rn(score, exp_of_negative(-mul_rn(o.iou(), o.iou()) / args.sigma));
  }
  return o.exceeds(args.iou_threshold) ? mul_rn(score, 1 - o.iou()) : score;
}

__global__ void __launch_bounds__(kPaddedThreads, 2)
    soft_kernel(const __grid_constant__ PaddedNms args, float* all_scores) {
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
    best = largest<kPaddedThreads>(best);
    if (best == 0) {
      break;
    }
    int64_t index = ranking_index(best);
    float4 box = add_extent(image.boxes[index], args.pixel_extent);
    int64_t label = image.classes[index];
    best = 0;
    for (int64_t i = threadIdx.x; i < args.num_boxes; i += kPaddedThreads) {
      float score = scores[i];
      if (i == index) {
        image.keep(kept, i, score);
        score = -INFINITY;
      } else if (score > -INFINITY && (args.class_agnostic || image.classes[i] == label)) {
        float4 other = add_extent(image.boxes[i], args.pixel_extent);
        score = lower(args, score, overlap(&box.x, &other.x));
      }
      scores[i] = score = score > args.min_score ? score : -INFINITY; // -inf for NaN
      if (score > -INFINITY) {
        best = max(best, ranking_key(ordered_bits(score), uint32_t(i)));
      }
    }
    ++kept;
  }
  finish(args, blockIdx.x, kept);
}

// ---- the flat form ----

struct FlatScratch {
  Step step;
  uint64_t overlaps[2][kStep]; // boxes of two earlier steps that overlap a box
  int turn;
};

__device__ float4 box_at(const FlatNms& args, int64_t position) {
  return reinterpret_cast<const float4*>(args.boxes)[args.index[position]];
}

// Where the group of the box at `position` starts, by a search with as many probes as threads.
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

// Publishes which boxes of a step are decided and which are kept: two words with the bits of 32 boxes
// each, which may be written again with more bits. Called by one warp.
__device__ void publish(uint64_t* words, int step, uint64_t decided, uint64_t kept) {
  int shift = 32 * lane_index();
  if (shift < kStep) {
    uint64_t word = decided >> shift << 32 | unsigned(kept >> shift);
    Atomic<uint64_t>(words[2 * int64_t(step) + lane_index()]).store(word, kRelaxed);
  }
}

// Waits until these boxes of an earlier step are decided, and returns those that are kept. Called by
// one warp.
__device__ uint64_t wait_for(uint64_t* words, int step, uint64_t boxes) {
  int half = lane_index() % 2;
  uint64_t wanted = boxes >> 32 * half << 32, word;
  Atomic<uint64_t> own(words[2 * int64_t(step) + half]);
  while (((word = own.load(kRelaxed)) & wanted) != wanted) {
    __nanosleep(32); // leaves the multiprocessor to the blocks it waits for
  }
  uint64_t low = __shfl_sync(kAllLanes, unsigned(word), 0);
  return boxes & (uint64_t(__shfl_sync(kAllLanes, unsigned(word), 1)) << 32 | low);
}

// Which boxes of an earlier step overlap the first `count` of this one. Called by all warps but the
// first.
__device__ void find_overlaps(
    const FlatNms& args, int64_t earlier, const Step& step, int count, uint64_t* overlaps) {
  int lane = lane_index();
  float4 first = box_at(args, earlier + lane), second = box_at(args, earlier + lane + 32);
  float first_area = area(&first.x), second_area = area(&second.x);
  for (int j = int(threadIdx.x) / 32 - 1; j < count; j += kFlatThreads / 32 - 1) {
    uint64_t boxes = ballot(
        step.overlaps(j, first, first_area, args.iou_threshold),
        step.overlaps(j, second, second_area, args.iou_threshold));
    if (lane == 0) {
      overlaps[j] = boxes;
    }
  }
}

// Which of the first `count` boxes of a step, whose group starts at `start`, are suppressed by boxes
// of earlier steps. Valid in the first warp, which waits while the others work one step ahead.
__device__ uint64_t find_suppressed(
    const FlatNms& args, uint64_t* words, int64_t start, int count, FlatScratch& scratch) {
  int lane = lane_index(), others = int(start % kStep); // boxes of other groups in a step
  uint64_t suppressed = 0;
  for (int s = int(start / kStep); s < scratch.turn; ++s) {
    uint64_t* overlaps = scratch.overlaps[s % 2];
    if (threadIdx.x >= 32) {
      find_overlaps(args, int64_t(s) * kStep, scratch.step, count, overlaps);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      uint64_t kept = wait_for(words, s, kAllBoxes << others);
      auto overlaps_kept = [&](int i) { return i < count && (overlaps[i] & kept) != 0; };
      suppressed |= ballot(overlaps_kept(lane), overlaps_kept(lane + 32));
    }
    others = 0;
  }
  return suppressed;
}

// `state` is a counter and two words for every step, all zero.
__global__ void __launch_bounds__(kFlatThreads, kThreadsOfMultiprocessor / kFlatThreads - 1)
    flat_kernel(const __grid_constant__ FlatNms args, uint64_t* state) {
  __shared__ FlatScratch scratch;
  Step& step = scratch.step;
  int t = int(threadIdx.x);
  if (t == 0) { // tickets follow start order: a block waits only on running blocks
    scratch.turn = int(atomicAdd(reinterpret_cast<unsigned long long*>(state), 1ull));
  }
  step.clear<kFlatThreads>();
  uint64_t* words = state + 1;
  int64_t first = int64_t(scratch.turn) * kStep;
  int count = int(min(args.num_boxes - first, int64_t(kStep)));
  if (t < count) {
    step.set(t, box_at(args, first + t), args.groups[first + t]);
  }
  // Boxes in the group of the first one, which may depend on earlier steps.
  int open = __syncthreads_count(t < count && args.groups[first + t] == args.groups[first]);
  find_suppressors<kFlatThreads>(step, count, args.iou_threshold);
  if (t < 32) {
    uint64_t decided = ~first_boxes(open);
    publish(words, scratch.turn, decided, resolve(step, first_boxes(count) & decided));
  }
  uint64_t suppressed = find_suppressed(args, words, find_group(args, first), open, scratch);
  if (t < 32) {
    uint64_t kept = resolve(step, first_boxes(count) & ~suppressed);
    publish(words, scratch.turn, kAllBoxes, kept);
    for (int i = t; i < count; i += 32) {
      args.keep[args.place[first + i]] = kept >> i & 1;
    }
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
    padded_kernel<<<blocks, kPaddedThreads, 0, stream>>>(args);
  } else {
    soft_kernel<<<blocks, kPaddedThreads, 0, stream>>>(args, scores);
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
  flat_kernel<<<unsigned(blocks), kFlatThreads, 0, stream>>>(args, state);
  return cudaGetLastError();
}

} // namespace fcos::cuda
