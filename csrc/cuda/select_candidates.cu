// select_candidates: the score rule becomes one bound on the logit per point, so that almost every
// logit costs one comparison, and the best of what exceeds it are found by the size of their keys.
//
// 1. scan_kernel reads all logits once. Candidates of a segment (one level of one image) go to a list,
//    and are counted by rank. Where there are more than the list can hold, the counts tell later
//    blocks below which rank nothing matters any more.
// 2. finish_kernel has a block for each segment, which sorts the best of the list and writes boxes,
//    scores and classes. Of segments whose list has overflowed, all blocks first collect what the
//    counts say is good enough, and the last to be done goes on. Where more candidates than the list
//    can hold have all but the same rank, this one narrows the range of keys down until they fit,
//    reading the segment again each time.
//
// Keys are unique, so neither the order in which candidates come nor which of them a full list has
// missed changes a result.

#include "ops.h"

#include <algorithm>

#include "../core/ranking.h"
#include "../core/scores.h"
#include "block.h"
#include "launch.h"
#include "numbers.h"

namespace fcos::cuda {
namespace {

constexpr int kScanThreads = 256, kFinishThreads = 512;

// Blocks of a scan that shall fit on a multiprocessor: as many as leave the compiler the registers
// with which it starts all loads of a turn at once.
template <class T>
constexpr int kByRegisters = sizeof(T) == 8 ? 2 : 4;
template <class T>
constexpr int kMinBlocks = std::min(kByRegisters<T>, kThreadsOfMultiprocessor / kScanThreads);

constexpr int kTileSize = 8192;               // logits that a block looks at together
constexpr int kPointBits = 9, kClassBits = 7; // of 16 that say which logit of a tile
constexpr int kTilePoints = 1 << kPointBits;  // at most
constexpr int kTileClasses = 1 << kClassBits; // at most
constexpr unsigned kSortable = 2048;          // keys that are sorted in shared memory

constexpr unsigned kCollectBlocks = 264; // that read segments again, if there is need

// Lists that are longer are shortened before they are sorted.
FCOS_HD int64_t longest_sorted(int64_t wanted) { return max_of(int64_t(kSortable), 2 * wanted); }

// Lists have room for these and for a tile, or for this share of a segment where that is more: seldom
// do more pass the threshold.
constexpr int64_t kListShare = 64;

// What neighboring points and classes of a level a block looks at together.
struct LevelPlan {
  int tile_points, tile_classes;
  int class_tiles;   // that share their points
  int tiles;         // of an image
  unsigned capacity; // of the list of a segment
  int64_t first_key; // of that list among those of an image
  bool columns_are_classes, is_vectorised;

  __device__ unsigned column_bits() const { return columns_are_classes ? kClassBits : kPointBits; }
};

// Of a segment, zeros before the first kernel.
struct State {
  unsigned found;                 // by the scan; more than the capacity if the list has overflowed
  unsigned collected, tiles_done; // after that
  unsigned lowest_bin;            // that still matters; bins below it are counted in part
  unsigned bins[kBins];
};

struct Plan {
  SelectCandidates args;
  LevelPlan level[kMaxLevels];
  BlocksOfLevels blocks; // entry i is for the i-th last level
  int64_t num_segments;  // B L
  int64_t keys_per_image;
  uint64_t* keys;       // [B, keys_per_image]
  State* states;        // [B L]
  unsigned* overflowed; // [1 + B L]: how many lists have overflowed, first 0, and which
};

struct Tile {
  int level;
  int64_t image;
  int first_point, num_points, first_class, num_classes;
};

__device__ Tile make_tile(const Plan& plan, int level, int64_t image, int index) {
  const LevelPlan& p = plan.level[level];
  int first_point = index / p.class_tiles * p.tile_points;
  int first_class = index % p.class_tiles * p.tile_classes;
  return {
      level,       image,
      first_point, min(p.tile_points, plan.args.logits.level[level].num_points - first_point),
      first_class, min(p.tile_classes, plan.args.num_classes - first_class),
  };
}

// Blocks that run together work on all images, so that each learns early from its counts.
__device__ Tile find_tile(const Plan& plan, unsigned block) {
  int entry = plan.blocks.level_of(int(block));
  unsigned index = block - unsigned(plan.blocks.first[entry]);
  unsigned images = unsigned(plan.args.num_images);
  int level = plan.args.levels.count - 1 - entry;
  return make_tile(plan, level, index % images, int(index / images));
}

// One level of one image.
struct Segment {
  int level;
  int64_t image;
  unsigned wanted; // slots
  unsigned capacity;
  uint64_t* keys; // the list
  State* state;
};

__device__ Segment find_segment(const Plan& plan, int level, int64_t image) {
  const SelectCandidates& args = plan.args;
  unsigned number = unsigned(image * args.levels.count + level);
  unsigned wanted = unsigned(args.slots[level + 1] - args.slots[level]);
  uint64_t* keys = plan.keys + image * plan.keys_per_image + plan.level[level].first_key;
  return {level, image, wanted, plan.level[level].capacity, keys, plan.states + number};
}
__device__ Segment find_segment(const Plan& plan, unsigned number) {
  unsigned num_levels = unsigned(plan.args.levels.count);
  return find_segment(plan, int(number % num_levels), number / num_levels);
}

// ---- keys ----

// Bits that order like a probability and grow in equal steps as it comes closer to 0, or to 1, where
// confident networks crowd their scores.
constexpr uint32_t kBitsOfHalf = 0x3f000000, kBitsOfOne = 2 * kBitsOfHalf;

FCOS_HD uint32_t probability_bits(float p) {
  return p < 0.5f ? bits_as<uint32_t>(p) : kBitsOfOne - bits_as<uint32_t>(1 - p);
}
FCOS_HD float probability_of(uint32_t bits) {
  return bits < kBitsOfHalf ? bits_as<float>(bits) : 1 - bits_as<float>(kBitsOfOne - bits);
}

constexpr uint64_t kEndOfKeys = uint64_t(kBitsOfOne + 1) << 32;

// The bins of the scan: 128 per factor of two, for ranks from 2^-8 to 1 - 2^-10.
constexpr uint32_t kFirstBinBits = 0x3b800000;
constexpr int kBinShift = 16;

FCOS_HD unsigned scan_bin(uint64_t key) {
  uint32_t bits = uint32_t(key >> 32);
  uint32_t bin = bits < kFirstBinBits ? 0 : (bits - kFirstBinBits) >> kBinShift;
  return bin < kBins ? bin : kBins - 1;
}
FCOS_HD Range scan_range(int bin) {
  auto start = [](int b) { return uint64_t(kFirstBinBits + (uint32_t(b) << kBinShift)) << 32; };
  return {bin == 0 ? 0 : start(bin), bin == int(kBins) - 1 ? kEndOfKeys : start(bin + 1)};
}

// Every class logit of a candidate of a point of this quality whose rank is not below `lowest`
// exceeds this.
FCOS_HD float bound_of(const SelectCandidates& args, float quality, float lowest) {
  float bound = logit_bound(args, quality), factor = args.rank_with_quality ? quality : 1.0f;
  float other = factor >= lowest ? logit_below(lowest / factor) : INFINITY;
  return lowest > 0 ? max_of(bound, other) : bound;
}

// ---- reading ----

__device__ int64_t offset(const Strides& strides, int64_t image, int channel, int64_t point) {
  return image * strides.image + channel * strides.channel + point * strides.point;
}

// Neighboring channels of a point. All are on their way before the first is converted.
template <class T, int N>
__device__ void read_as(const Map& map, int64_t image, int channel, int64_t point, float* out) {
  const T* data = static_cast<const T*>(map.data);
  T stored[N];
#pragma unroll
  for (int c = 0; c < N; ++c) {
    stored[c] = data[offset(map.data_strides, image, channel + c, point)];
  }
#pragma unroll
  for (int c = 0; c < N; ++c) {
    out[c] = float(widen(stored[c]));
  }
}

template <int N>
__device__ void read(const Map& map, DType dtype, int64_t image, int64_t point, float* out) {
  switch (dtype) {
    case DType::kHalf:
      return read_as<__half, N>(map, image, 0, point, out);
    case DType::kBFloat16:
      return read_as<__nv_bfloat16, N>(map, image, 0, point, out);
    case DType::kDouble:
      return read_as<double, N>(map, image, 0, point, out);
    default:
      return read_as<float, N>(map, image, 0, point, out);
  }
}

__device__ float read_quality(const Plan& plan, int level, int64_t image, int64_t point) {
  float logit;
  read<1>(plan.args.quality.level[level], plan.args.quality_dtype, image, point, &logit);
  return sigmoid(logit);
}

// One (point, class) pair.
struct Scores {
  float cls, product;
};

__device__ Scores make_scores(float logit, float quality) {
  float cls = sigmoid(logit);
  return {cls, mul_rn(cls, quality)};
}

// What other blocks may be changing.
__device__ unsigned read_now(const unsigned* from) {
  return *static_cast<const volatile unsigned*>(from);
}

// ---- looking through a tile ----

template <int Threads>
struct Scratch : Histogram<Threads> {
  alignas(16) float bound[kTilePoints]; // of every point
  float quality[kTilePoints];
  uint16_t survivors[kTileSize]; // row << column_bits | column, in any order
  unsigned num_survivors;
};

// A tile as it lies in memory: rows of points with columns of classes, or the other way round.
template <class T>
struct Rows {
  const T* data;
  int64_t row_step, column_step;
  unsigned rows, columns;
};

template <class T>
__device__ Rows<T> make_rows(const Plan& plan, const Tile& tile) {
  const Map& map = plan.args.logits.level[tile.level];
  const Strides& at = map.data_strides;
  const T* data =
      static_cast<const T*>(map.data) + offset(at, tile.image, tile.first_class, tile.first_point);
  unsigned points = unsigned(tile.num_points), classes = unsigned(tile.num_classes);
  if (plan.level[tile.level].columns_are_classes) {
    return {data, at.point, at.channel, points, classes};
  }
  return {data, at.channel, at.point, classes, points};
}

// The vectors of a tile at which a thread looks: every Threads-th.
template <int Threads>
struct Walk {
  unsigned per_row, down, right, row, vector;

  __device__ explicit Walk(unsigned vectors_per_row)
      : per_row(vectors_per_row),
        down(Threads / per_row),
        right(Threads % per_row),
        row(threadIdx.x / per_row),
        vector(threadIdx.x % per_row) {}

  __device__ __forceinline__ void next() {
    row += down, vector += right;
    if (vector >= per_row) {
      vector -= per_row, ++row;
    }
  }
};

// Bounds of the elements of a vector.
template <int V>
__device__ __forceinline__ void load_bounds(
    const float* bound, bool same_point, unsigned row, unsigned vector, float (&out)[V]) {
  if constexpr (V == 1) {
    out[0] = bound[same_point ? row : vector];
  } else if (same_point) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      out[j] = bound[row];
    }
  } else {
    using Words = std::conditional_t<V % 4 == 0, float4, float2>;
    constexpr int kEach = int(sizeof(Words) / sizeof(float));
#pragma unroll
    for (int j = 0; j < V; j += kEach) {
      Words words = *reinterpret_cast<const Words*>(bound + vector * V + j);
      memcpy(out + j, &words, sizeof words);
    }
  }
}

// Bit i * V + j is for element j of the i-th vector of this thread: whether it exceeds the bound.
template <int V, int Threads, class T>
__device__ uint32_t
find_survivors(const Rows<T>& tile, bool columns_are_classes, const float* bound) {
  constexpr int kTurns = kTileSize / Threads / V;
  constexpr int kAtOnce = kTurns < 4 ? kTurns : 4;
  static_assert(kTurns * V <= 32);
  int64_t column_step = V > 1 ? 1 : tile.column_step;
  Walk<Threads> walk(tile.columns / V);
  uint32_t survivors = 0;
#pragma unroll 1
  for (int turn = 0; turn < kTurns && walk.row < tile.rows; turn += kAtOnce) {
    Vector<T, V> logits[kAtOnce];
    unsigned rows_of[kAtOnce], vectors_of[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) { // all are on their way before the first is looked at
      rows_of[k] = walk.row, vectors_of[k] = walk.vector;
      if (walk.row < tile.rows) {
        logits[k] =
            load<T, V>(tile.data + walk.row * tile.row_step + walk.vector * V * column_step, false);
      }
      walk.next();
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (rows_of[k] < tile.rows) {
        typename Compute<T>::Type x[V];
        unpack<T, V>(logits[k], x);
        float limit[V];
        load_bounds<V>(bound, columns_are_classes, rows_of[k], vectors_of[k], limit);
        uint32_t exceed = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          exceed |= float(x[j]) > limit[j] ? 1u << j : 0;
        }
        survivors |= exceed << ((turn + k) * V);
      }
    }
  }
  return survivors;
}

// Lists the elements of a tile that exceed their bounds; returns how many.
template <int V, int Threads, class T>
__device__ unsigned list_survivors(
    const Rows<T>& tile, const LevelPlan& level, Scratch<Threads>& scratch) {
  uint32_t survivors = find_survivors<V, Threads>(tile, level.columns_are_classes, scratch.bound);
  if (!__syncthreads_or(survivors != 0)) {
    return 0;
  }
  unsigned at = atomicAdd(&scratch.num_survivors, unsigned(__popc(survivors)));
  for (Walk<Threads> walk(tile.columns / V); survivors != 0; survivors >>= V, walk.next()) {
    unsigned first = walk.row << level.column_bits() | walk.vector * V;
    for (uint32_t bits = survivors & ((1u << V) - 1); bits != 0; bits &= bits - 1) {
      scratch.survivors[at++] = uint16_t(first + unsigned(__ffs(int(bits))) - 1);
    }
  }
  __syncthreads();
  return scratch.num_survivors;
}

// First all of the quality, for `low` may be on its way from memory, too.
template <int Threads>
__device__ void make_bounds(
    const Plan& plan, const Tile& tile, uint64_t low, Scratch<Threads>& scratch) {
#pragma unroll 1
  for (int p = int(threadIdx.x); p < tile.num_points; p += Threads) {
    scratch.quality[p] = read_quality(plan, tile.level, tile.image, tile.first_point + p);
  }
  float lowest = probability_of(uint32_t(low >> 32)) * (1 - 1e-6f);
#pragma unroll 1
  for (int p = int(threadIdx.x); p < tile.num_points; p += Threads) {
    scratch.bound[p] = bound_of(plan.args, scratch.quality[p], lowest);
  }
  if (threadIdx.x == 0) {
    scratch.num_survivors = 0;
  }
  __syncthreads();
}

// Lists what may be candidates with keys of `low` and more; returns how many.
template <class T, int Threads>
__device__ unsigned look_through(
    const Plan& plan, const Tile& tile, uint64_t low, Scratch<Threads>& scratch) {
  make_bounds(plan, tile, low, scratch);
  const LevelPlan& level = plan.level[tile.level];
  Rows<T> rows = make_rows<T>(plan, tile);
  return level.is_vectorised
             ? list_survivors<kVectorBytes / int(sizeof(T)), Threads>(rows, level, scratch)
             : list_survivors<1, Threads>(rows, level, scratch);
}

// Calls take(valid, key) for what is listed; only candidates with keys of `low` and more are valid.
// The lanes of a warp call it together.
template <class T, int Threads, class Take>
__device__ void take_survivors(
    const Plan& plan, const Tile& tile, uint64_t low, unsigned count, Scratch<Threads>& scratch,
    Take&& take) {
  const SelectCandidates& args = plan.args;
  const LevelPlan& level = plan.level[tile.level];
  Rows<T> rows = make_rows<T>(plan, tile);
  for (unsigned first = 0; first < count; first += Threads) {
    bool valid = first + threadIdx.x < count;
    uint64_t key = 0;
    if (valid) {
      unsigned element = scratch.survivors[first + threadIdx.x];
      unsigned row = element >> level.column_bits();
      unsigned column = element & ((1u << level.column_bits()) - 1);
      unsigned p = level.columns_are_classes ? row : column;
      unsigned channel = unsigned(tile.first_class) + (level.columns_are_classes ? column : row);
      float logit = float(widen(rows.data[row * rows.row_step + column * rows.column_step]));
      Scores scores = make_scores(logit, scratch.quality[p]);
      float rank = rank_of(args, scores.cls, scores.product);
      unsigned index = (unsigned(tile.first_point) + p) * unsigned(args.num_classes) + channel;
      key = ranking_key(probability_bits(rank), index);
      valid = passes(args, scores.cls, scores.product) && key >= low;
    }
    take(valid, key);
  }
  __syncthreads();
}

// ---- the kernels ----

// Adds to the counts of a segment and raises its lowest bin. Counts that other blocks are about to add
// are missed, which makes the bin too low, if anything.
__device__ void add_counts(const Segment& segment, Scratch<kScanThreads>& scratch) {
#pragma unroll
  for (unsigned i = threadIdx.x; i < kBins; i += kScanThreads) {
    unsigned& own = scratch.bins[i];
    unsigned* all = &segment.state->bins[i];
    own = own != 0 ? own + atomicAdd(all, own) : read_now(all);
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
  uint64_t low = scan_range(int(read_now(&state.lowest_bin))).low;
  unsigned count = look_through<T>(plan, tile, low, scratch);
  if (count == 0) {
    return;
  }
  bool many = count > kScanThreads; // a few are counted where all counts go in the end
  if (many) {
    scratch.clear();
  }
  // Then there is no need to queue up for the list. The lanes of a warp must agree.
  bool full = __any_sync(kAllLanes, read_now(&state.found) > segment.capacity);
  take_survivors<T>(plan, tile, low, count, scratch, [&](bool valid, uint64_t key) {
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

// Appends what may be candidates of a tile with keys of `low` and more to the list.
template <class T>
__device__ void collect_tile(
    const Plan& plan, const Segment& segment, unsigned index, uint64_t low,
    FinishScratch& scratch) {
  Tile tile = make_tile(plan, segment.level, segment.image, int(index));
  unsigned count = look_through<T>(plan, tile, low, scratch);
  take_survivors<T>(plan, tile, low, count, scratch, [&](bool valid, uint64_t key) {
    append(valid, key, segment.keys, segment.capacity, &segment.state->collected);
  });
}

// Collects what `bin` leaves over from this block's share of the tiles, which begins with `first`.
// Returns whether all other blocks are done.
template <class T>
__device__ bool collect(
    const Plan& plan, const Segment& segment, unsigned first, FinishScratch& scratch) {
  unsigned tiles = unsigned(plan.level[segment.level].tiles), done = 0;
  Bin bin = scratch.find(segment.state->bins, segment.wanted);
  bool fits = bin.above + bin.inside <= segment.capacity; // or replace_list() will do it
  for (unsigned i = first; i < tiles; i += gridDim.x, ++done) {
    if (fits) {
      collect_tile<T>(plan, segment, i, scan_range(bin.index).low, scratch);
    }
  }
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&segment.state->tiles_done, done) + done == tiles;
    __threadfence();
  }
  return __syncthreads_or(last);
}

// Shortens a list of `count` keys to those from range->low on: the best ones, no more than `most`,
// with `bin` and `range` to start from. They move to its front, or to shared memory if they may and
// fit. Returns how many they are.
__device__ unsigned shorten(
    const Segment& segment, unsigned count, Bin bin, Range* range, bool in_place,
    FinishScratch& scratch) {
  auto for_each = [&](auto&& take) {
    for_each_key<kFinishThreads, 4, true>(count, [&](int64_t i) { return segment.keys[i]; }, take);
  };
  unsigned most = unsigned(min(longest_sorted(segment.wanted), int64_t(segment.capacity)));
  unsigned left = scratch.narrow(bin, segment.wanted, most, range, for_each);
  uint64_t* to = in_place || left > kSortable ? segment.keys : scratch.sorted;
  scratch.clear();
  for_each([&](bool valid, uint64_t key) {
    append(valid && key >= range->low, key, to, left, &scratch.count);
  });
  return left;
}

// Replaces the list of a segment by the best keys of `low` and more, shortening it each time that it
// may overflow; returns how many.
template <class T>
__device__ unsigned replace_list(
    const Plan& plan, const Segment& segment, uint64_t low, FinishScratch& scratch) {
  unsigned count = 0;
  for (int i = 0; i < plan.level[segment.level].tiles; ++i) {
    collect_tile<T>(plan, segment, i, low, scratch);
    count = read_now(&segment.state->collected);
    if (count + kTileSize > segment.capacity) {
      Range range = {low, kEndOfKeys};
      count = shorten(segment, count, {0, 0, count}, &range, true, scratch);
      low = range.low;
      if (threadIdx.x == 0) {
        segment.state->collected = count;
      }
      __syncthreads();
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
    read_as<T, 1>(args.logits.level[level], segment.image, found, point, &logit);
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

// From the list of a segment to its slots.
template <class T>
__device__ void finish(const Plan& plan, const Segment& segment, FinishScratch& scratch) {
  State& state = *segment.state;
  unsigned count = state.found <= segment.capacity ? state.found : state.collected;
  Range range = {0, kEndOfKeys};
  Bin bin = {0, 0, count};
  if (state.found > kSortable) {
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
  if (blockIdx.x < plan.num_segments) {
    Segment segment = find_segment(plan, blockIdx.x);
    if (segment.state->found <= segment.capacity) {
      finish<T>(plan, segment, scratch);
    }
  }
  unsigned first = blockIdx.x; // tile of the next segment that is this block's
  for (unsigned i = 0; i < *plan.overflowed; ++i) {
    Segment segment = find_segment(plan, plan.overflowed[1 + i]);
    unsigned tiles = unsigned(plan.level[segment.level].tiles);
    if (first < tiles && collect<T>(plan, segment, first, scratch)) {
      finish<T>(plan, segment, scratch);
    }
    while (first < tiles) {
      first += gridDim.x;
    }
    first -= tiles;
  }
}

// ---- the host's side ----

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
  const Strides& strides = map.data_strides;
  plan.columns_are_classes = strides.channel == 1 && strides.point != 1;
  int64_t row_step = plan.columns_are_classes ? strides.point : strides.channel;
  int64_t column_step = plan.columns_are_classes ? strides.channel : strides.point;
  int64_t columns = plan.columns_are_classes ? classes : points;
  int64_t vector = kVectorBytes / bytes_of(args.logits_dtype);
  plan.is_vectorised = column_step == 1 && row_step % vector == 0 && strides.image % vector == 0 &&
                       columns % vector == 0 &&
                       reinterpret_cast<uintptr_t>(map.data) % kVectorBytes == 0;
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
