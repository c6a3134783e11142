// select_candidates: the score rule becomes one bound on the logits of each point, so almost every
// logit costs one comparison. The best of those above their bound are selected by unique keys.
//
// 1. scan_kernel reads all logits once. Candidates of a segment (one level of one image) go to a list
//    and are counted by rank. If there are more than the list can hold, the counts tell later blocks
//    which ranks no longer matter.
// 2. finish_kernel has a block per segment, which sorts the best candidates of the list and writes
//    boxes, scores and classes. If a list has overflowed, all blocks first collect the candidates that
//    are good enough by the counts, and the last block to finish continues. If more candidates than
//    the list can hold have nearly the same rank, it narrows the range of keys until they fit, reading
//    the segment again each time.
//
// Keys are unique, so results depend neither on the order of candidates nor on which of them a full
// list has missed.

#include "ops.h"

#include "candidate_tiles.h"

namespace fcos::cuda {
namespace {

// Adds to the counts of a segment and raises its lowest bin. Missing the counts that other blocks are
// about to add can only make the bin too low.
__device__ void add_counts(const Segment& segment, Scratch<kScanThreads>& scratch) {
#pragma unroll
  for (unsigned i = threadIdx.x; i < kBins; i += kScanThreads) {
    unsigned& own = scratch.bins[i];
    unsigned* all = &segment.state->bins[i];
    own = own != 0 ? own + atomicAdd(all, own) : Atomic<unsigned>(*all).load(kRelaxed);
  }
  __syncthreads();
  Bin bin = scratch.find(scratch.bins, segment.wanted);
  if (threadIdx.x == 0) {
    atomicMax(&segment.state->lowest_bin, unsigned(max(bin.index, 0)));
  }
}

template <class T>
__global__ void __launch_bounds__(kScanThreads, kMinBlocks<T>)
    scan_kernel(const __grid_constant__ Plan plan) {
  __shared__ Scratch<kScanThreads> scratch;
  Tile tile = find_tile(plan, blockIdx.x);
  Segment segment = find_segment(plan, tile.level, tile.image);
  State& state = *segment.state;
  uint64_t low = scan_range(int(Atomic<unsigned>(state.lowest_bin).load(kRelaxed))).low;
  unsigned count = find_survivors<T>(plan, tile, low, scratch);
  if (count == 0) {
    return;
  }
  bool many = count > kScanThreads; // a few are counted where all counts go in the end
  if (many) {
    scratch.clear();
  }
  // Skips the atomics of the list. The lanes of a warp must agree.
  bool full =
      __any_sync(kAllLanes, Atomic<unsigned>(state.found).load(kRelaxed) > segment.capacity);
  for_each_survivor<T>(plan, tile, low, count, scratch, [&](bool valid, uint64_t key) {
    if (many) {
      count_key(valid, scan_bin(key), scratch.bins);
    } else {
      count_key(valid, scan_bin(key), state.bins);
    }
    if (!full) {
      unsigned at = append(valid, key, segment.keys, segment.capacity, &state.found);
      if (valid && at == segment.capacity) {
        plan.overflowed[1 + atomicAdd(plan.overflowed, 1u)] = unsigned(segment.state - plan.states);
      }
      full = __any_sync(kAllLanes, at > segment.capacity);
    }
  });
  if (many) {
    add_counts(segment, scratch);
  }
}

struct FinishScratch : Scratch<kFinishThreads> {
  uint64_t sorted[kSortable];
};

// Appends possible candidates of a tile with keys of at least `low` to the list.
template <class T>
__device__ void collect_tile(
    const Plan& plan, const Segment& segment, unsigned index, uint64_t low,
    FinishScratch& scratch) {
  Tile tile = make_tile(plan, segment.level, segment.image, int(index));
  unsigned count = find_survivors<T>(plan, tile, low, scratch);
  for_each_survivor<T>(plan, tile, low, count, scratch, [&](bool valid, uint64_t key) {
    append(valid, key, segment.keys, segment.capacity, &segment.state->collected);
  });
}

// Collects the candidates that are good enough by the counts from this block's share of the tiles:
// every gridDim.x-th from `first` on, which becomes the first of the next segment. Returns whether this
// block completes the segment.
template <class T>
__device__ bool collect(
    const Plan& plan, const Segment& segment, unsigned* first, FinishScratch& scratch) {
  unsigned tiles = unsigned(plan.level[segment.level].tiles), done = 0;
  bool last = false;
  if (*first < tiles) {
    Bin bin = scratch.find(segment.state->bins, segment.wanted);
    bool fits = bin.above + bin.inside <= segment.capacity; // or replace_list() will do it
    for (; *first < tiles; *first += gridDim.x, ++done) {
      if (fits) {
        collect_tile<T>(plan, segment, *first, scan_range(bin.index).low, scratch);
      }
    }
    last = is_last_part(&segment.state->tiles_done, done, tiles);
  }
  *first -= tiles;
  return last;
}

// Narrows `range`, which holds the keys of `bin`, until few enough to sort reach range->low, and
// shortens a list of `count` keys to them. They move to its front, or, unless `in_place`, to shared
// memory if they fit. Returns how many are left.
__device__ unsigned shorten(
    const Segment& segment, unsigned count, Bin bin, Range* range, bool in_place,
    FinishScratch& scratch) {
  auto load = [&](int64_t i) { return segment.keys[i]; };
  auto for_each = [&](auto&& take) { for_each_key<kFinishThreads, 4, false>(count, load, take); };
  unsigned most = unsigned(longest_sorted(segment.wanted));
  unsigned left = scratch.narrow(bin, segment.wanted, most, range, for_each);
  uint64_t* to = in_place || left > kSortable ? segment.keys : scratch.sorted;
  if (threadIdx.x == 0) {
    scratch.count = 0;
  }
  for_each_key<kFinishThreads, 4, true>(count, load, [&](bool valid, uint64_t key) {
    append(valid && key >= range->low, key, to, left, &scratch.count);
  });
  return left;
}

// Replaces the list of a segment by its best keys, of at least `low`, and shortens it whenever the next
// tile might overflow it. Returns how many keys it has.
template <class T>
__device__ unsigned replace_list(
    const Plan& plan, const Segment& segment, uint64_t low, FinishScratch& scratch) {
  unsigned count = 0;
  for (int i = 0; i < plan.level[segment.level].tiles; ++i) {
    collect_tile<T>(plan, segment, i, low, scratch);
    count = segment.state->collected;
    if (count + kTileSize > segment.capacity) {
      Range range = {low, kEndOfKeys};
      count = shorten(segment, count, {0, 0, count}, &range, true, scratch);
      low = range.low;
      if (threadIdx.x == 0) {
        segment.state->collected = count;
      }
    }
  }
  return count;
}

// Writes the candidate of a key, or nothing for the key 0.
template <class T>
__device__ void write_candidate(
    const Plan& plan, const Segment& segment, int64_t slot, uint64_t key) {
  const SelectCandidates& args = plan.args;
  int level = segment.level, channel = -1;
  float box[4], score = 0;
  if (key != 0) {
    uint32_t index = ranking_index(key);
    int64_t point = index / unsigned(args.num_classes);
    int found = int(index % unsigned(args.num_classes));
    float logit, ltrb[4];
    read<T, 1>(args.logits.level[level], segment.image, found, point, &logit);
    read<4>(args.ltrb.level[level], args.ltrb_dtype, segment.image, point, ltrb);
    Scores scores = make_scores(logit, read_quality(plan, level, segment.image, point));
    if (make_box(args, level, segment.image, point, ltrb, box)) {
      channel = found, score = score_of(args, scores.cls, scores.product);
    }
  }
  int64_t to = segment.image * args.slots[args.levels.count] + args.slots[level] + slot;
  reinterpret_cast<float4*>(args.boxes)[to] =
      channel < 0 ? make_float4(0, 0, 0, 0) : make_float4(box[0], box[1], box[2], box[3]);
  args.scores[to] = score;
  args.classes[to] = channel;
}

// Writes the list of a segment to its slots.
template <class T>
__device__ void finish(const Plan& plan, const Segment& segment, FinishScratch& scratch) {
  State& state = *segment.state;
  unsigned count = state.found <= segment.capacity ? state.found : state.collected;
  Range range = {0, kEndOfKeys};
  Bin bin = {0, 0, count};
  if (state.found > longest_sorted(segment.wanted)) { // the counts tell which ones are wanted
    bin = scratch.find(state.bins, segment.wanted);
    range = scan_range(bin.index);
    if (bin.above + bin.inside > segment.capacity) {
      count = replace_list<T>(plan, segment, range.low, scratch);
      bin = {0, 0, count};
    }
  }
  count = shorten(segment, count, bin, &range, false, scratch);
  uint64_t* sorted = count <= kSortable ? scratch.sorted : segment.keys;
  sort_descending<kFinishThreads>(sorted, count);
  for (unsigned slot = threadIdx.x; slot < segment.wanted; slot += kFinishThreads) {
    write_candidate<T>(plan, segment, slot, slot < count ? sorted[slot] : 0);
  }
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish_kernel(const __grid_constant__ Plan plan) {
  __shared__ FinishScratch scratch;
  unsigned first = blockIdx.x; // tile of the next segment that has overflowed
  // The block's own segment, if there is one, then all that have overflowed.
  for (unsigned i = blockIdx.x < plan.num_segments ? 0 : 1; i <= *plan.overflowed; ++i) {
    Segment segment = find_segment(plan, i == 0 ? blockIdx.x : plan.overflowed[i]);
    bool is_complete = i == 0 ? segment.state->found <= segment.capacity
                              : collect<T>(plan, segment, &first, scratch);
    if (is_complete) {
      finish<T>(plan, segment, scratch);
    }
  }
}

// ---- host ----

LevelPlan make_level(const SelectCandidates& args, int l) {
  const Map& map = args.logits.level[l];
  LevelPlan plan{};
  int64_t classes = args.num_classes, points = map.num_points;
  if (classes == 0 || points == 0) {
    return plan;
  }
  int64_t parts = divide_up(classes, kTileClasses);
  plan.tile_classes = int(parts == 1 ? classes : divide_up(divide_up(classes, parts), 16) * 16);
  plan.class_tiles = int(divide_up(classes, plan.tile_classes));
  plan.tile_points = std::min(kTilePoints, kTileSize / plan.tile_classes / 32 * 32);
  plan.tiles = int(divide_up(points, plan.tile_points)) * plan.class_tiles;
  int64_t room = longest_sorted(args.slots[l + 1] - args.slots[l]) + kTileSize;
  plan.capacity =
      unsigned(std::min(classes * points, std::max(room, classes * points / kListShare)));
  plan.columns_are_classes = has_channels_last(map);
  RowStrides strides = make_row_strides(map.data_strides, plan.columns_are_classes);
  int64_t columns = plan.columns_are_classes ? classes : points;
  plan.is_vectorised = has_vectors(map.data, strides, columns, bytes_of(args.logits_dtype));
  return plan;
}

// Small levels come first: the many blocks of the large ones even out what these leave idle.
cudaError_t make_plan(const SelectCandidates& args, Plan* plan) {
  *plan = Plan{};
  plan->args = args;
  plan->num_segments = args.num_images * args.levels.count;
  int64_t total = plan->num_segments;
  for (int l = args.levels.count - 1; l >= 0; --l) {
    plan->level[l] = make_level(args, l);
    plan->level[l].first_key = plan->keys_per_image;
    plan->keys_per_image += plan->level[l].capacity;
    int64_t blocks = args.num_images * plan->level[l].tiles;
    total += blocks;
    if (total > kMaxBlocks) {
      return cudaErrorInvalidConfiguration;
    }
    plan->blocks.append(blocks);
  }
  return cudaSuccess;
}

int64_t count_keys(const Plan& plan) { return plan.args.num_images * plan.keys_per_image; }
int64_t count_bytes(const Plan& plan) { // that must be zeros
  return plan.num_segments * int64_t(sizeof(State) + sizeof(unsigned)) + int64_t(sizeof(unsigned));
}

template <class T>
cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  unsigned blocks = unsigned(plan.blocks.total()), segments = unsigned(plan.num_segments);
  if (blocks > 0) {
    scan_kernel<T><<<blocks, kScanThreads, 0, stream>>>(plan);
  }
  blocks = std::max(segments, std::min(blocks, kCollectBlocks));
  finish_kernel<T><<<blocks, kFinishThreads, 0, stream>>>(plan);
  return cudaGetLastError();
}

} // namespace

int64_t select_candidates_memory(const SelectCandidates& args) {
  Plan plan;
  bool fits = make_plan(args, &plan) == cudaSuccess;
  return fits ? count_keys(plan) + divide_up(count_bytes(plan), int64_t(sizeof(uint64_t))) : 0;
}

cudaError_t launch_select_candidates(
    const SelectCandidates& args, uint64_t* memory, cudaStream_t stream) {
  Plan plan;
  cudaError_t error = make_plan(args, &plan);
  if (error != cudaSuccess || plan.num_segments == 0) {
    return error;
  }
  plan.keys = memory;
  plan.states = reinterpret_cast<State*>(memory + count_keys(plan));
  plan.overflowed = reinterpret_cast<unsigned*>(plan.states + plan.num_segments);
  error = cudaMemsetAsync(plan.states, 0, size_t(count_bytes(plan)), stream);
  if (error != cudaSuccess) {
    return error;
  }
  with_type(args.logits_dtype, [&](auto zero) { error = launch<decltype(zero)>(plan, stream); });
  return error;
}

} // namespace fcos::cuda
