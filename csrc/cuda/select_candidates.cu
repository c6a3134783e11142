// select_candidates: the score rule becomes one bound on the logit per point, so that almost every
// logit costs one comparison, and the best of what exceeds it are found by the size of their keys.
//
// 1. scan_kernel reads all logits once. Candidates of a segment (one level of one image) go to a list
//    that may overflow, and are counted by rank. The counts tell later blocks below which rank nothing
//    matters any more.
// 2. collect_kernel reads the segments again whose list has overflowed. The counts say above which
//    rank the list is long enough but does not overflow.
// 3. finish_kernel sorts the list of a segment and writes boxes, scores and classes. Where more
//    candidates than the list can hold have all but the same rank, it first narrows the range of
//    keys down until they fit, reading the segment again each time.
//
// Keys are unique, so neither the order in which candidates come nor which of them a full list has
// missed changes a result. The lists lie where the boxes will be, the only other memory is for counts.

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

// What neighbouring points and classes of a level a block looks at together.
struct LevelPlan {
  int tile_points, tile_classes;
  int class_tiles; // that share their points
  int tiles;       // of an image
  bool columns_are_classes, is_vectorised;

  __device__ unsigned column_bits() const { return columns_are_classes ? kClassBits : kPointBits; }
};

struct Plan {
  SelectCandidates args;
  LevelPlan level[kMaxLevels];
  BlocksOfLevels blocks; // entry i is for the i-th last level
  unsigned* state;       // [B, L, kStateSize], zeros before the first kernel
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

constexpr int kStateSize = int(kBins) + 3;

// One level of one image.
struct Segment {
  unsigned wanted;   // slots
  uint64_t* keys;    // the list, in the memory of the boxes of these slots
  unsigned capacity; // of the list
  unsigned* found;   // by the scan; more than the capacity if the list has overflowed
  unsigned* collected;
  unsigned* lowest_bin; // that still matters; bins below it are counted in part
  unsigned* bins;
};

__device__ Segment find_segment(const Plan& plan, int level, int64_t image) {
  const SelectCandidates& args = plan.args;
  int64_t num_slots = args.slots[args.levels.count];
  int64_t wanted = args.slots[level + 1] - args.slots[level];
  unsigned* state = plan.state + (image * args.levels.count + level) * kStateSize;
  float* boxes = args.boxes + 4 * (image * num_slots + args.slots[level]);
  int64_t capacity = min(2 * wanted, int64_t(UINT32_MAX));
  return {
      unsigned(wanted),   reinterpret_cast<uint64_t*>(boxes),
      unsigned(capacity), state,
      state + 1,          state + 2,
      state + 3,
  };
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
  float bound = logit_bound(args, quality);
  if (!(lowest > 0)) {
    return bound;
  }
  if (!args.rank_with_quality) {
    return max_of(bound, logit_below(lowest));
  }
  return max_of(bound, quality >= lowest ? logit_below(lowest / quality) : INFINITY);
}

// ---- reading ----

__device__ int64_t offset(const Strides& strides, int64_t image, int channel, int64_t point) {
  return image * strides.image + channel * strides.channel + point * strides.point;
}

// Neighbouring channels of a point. All are on their way before the first is converted.
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
struct Scratch {
  alignas(16) float bound[kTilePoints]; // of every point
  float quality[kTilePoints];
  uint16_t survivors[kTileSize]; // row << column_bits | column, in any order
  unsigned num_survivors;
  unsigned of_warps[Threads / 32];
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

template <class T, int Threads, class Take>
__device__ void scan_tile(
    const Plan& plan, const Tile& tile, uint64_t low, Scratch<Threads>& scratch, Take&& take) {
  unsigned count = look_through<T>(plan, tile, low, scratch);
  take_survivors<T>(plan, tile, low, count, scratch, take);
}

// ---- the kernels ----

struct ScanScratch {
  Scratch<kScanThreads> tile;
  unsigned bins[kBins];
  Bin found;
};

// Adds to the counts of a segment and raises its lowest bin. Counts that other blocks are about to add
// are missed, which makes the bin too low, if anything.
__device__ void add_counts(const Segment& segment, ScanScratch& scratch) {
#pragma unroll
  for (unsigned i = 0; i < kBins; i += kScanThreads) {
    unsigned& own = scratch.bins[i + threadIdx.x];
    unsigned* all = &segment.bins[i + threadIdx.x];
    own = own != 0 ? own + atomicAdd(all, own) : read_now(all);
  }
  __syncthreads();
  Bin bin =
      find_bin<kScanThreads>(scratch.bins, segment.wanted, scratch.tile.of_warps, &scratch.found);
  if (threadIdx.x == 0) {
    atomicMax(segment.lowest_bin, unsigned(max(bin.index, 0)));
  }
}

template <class T>
__global__ void __launch_bounds__(kScanThreads, kMinBlocks<T>)
    scan_kernel(const __grid_constant__ Plan plan) {
  __shared__ ScanScratch scratch;
  Tile tile = find_tile(plan, blockIdx.x);
  Segment segment = find_segment(plan, tile.level, tile.image);
  uint64_t low = scan_range(int(read_now(segment.lowest_bin))).low;
  unsigned count = look_through<T>(plan, tile, low, scratch.tile);
  if (count == 0) {
    return;
  }
  bool many = count > kScanThreads; // a few are counted where all counts go in the end
  if (many) {
    clear_bins<kScanThreads>(scratch.bins);
  }
  // Then there is no need to queue up for the list. The lanes of a warp must agree.
  bool full = __any_sync(kAllLanes, read_now(segment.found) > segment.capacity);
  take_survivors<T>(plan, tile, low, count, scratch.tile, [&](bool valid, uint64_t key) {
    if (many) {
      count_key(valid, scan_bin(key), scratch.bins);
    } else {
      count_key(valid, scan_bin(key), segment.bins);
    }
    if (!full) {
      full = append(valid, key, segment.keys, segment.capacity, segment.found) > segment.capacity;
    }
  });
  if (many) {
    add_counts(segment, scratch);
  }
}

// Its first blocks look at what the last ones of the scan have left in the cache.
template <class T>
__global__ void __launch_bounds__(kScanThreads, kMinBlocks<T>)
    collect_kernel(const __grid_constant__ Plan plan) {
  __shared__ Scratch<kScanThreads> scratch;
  __shared__ Bin found;
  Tile tile = find_tile(plan, gridDim.x - 1 - blockIdx.x);
  Segment segment = find_segment(plan, tile.level, tile.image);
  if (*segment.found <= segment.capacity) {
    return;
  }
  Bin bin = find_bin<kScanThreads>(segment.bins, segment.wanted, scratch.of_warps, &found);
  if (bin.above + bin.inside > segment.capacity) {
    return; // finish_kernel will do it
  }
  scan_tile<T>(plan, tile, scan_range(bin.index).low, scratch, [&](bool valid, uint64_t key) {
    append(valid, key, segment.keys, segment.capacity, segment.collected);
  });
}

struct FinishScratch {
  Scratch<kFinishThreads> scan;
  unsigned bins[kBins];
  Bin found;
  unsigned count;
};

// Narrows a range of keys to those among which the best `wanted` of it end. Where all have one rank,
// the first tiles have the best, and no others are looked at.
template <class T>
__device__ Bin narrow(
    const Plan& plan, int level, int64_t image, unsigned wanted, Range* range,
    FinishScratch& scratch) {
  const LevelPlan& p = plan.level[level];
  uint32_t rank = uint32_t((range->high - 1) >> 32);
  bool one_rank = range->low >> 32 == rank;
  int shift = range->shift();
  uint64_t least = 0;
  if (threadIdx.x == 0) {
    scratch.count = 0;
  }
  clear_bins<kFinishThreads>(scratch.bins);
  for (int i = 0; i < p.tiles && least == 0; ++i) {
    Tile tile = make_tile(plan, level, image, i);
    scan_tile<T>(plan, tile, range->low, scratch.scan, [&](bool valid, uint64_t key) {
      valid = valid && range->contains(key);
      count_key(valid, unsigned((key - range->low) >> shift), scratch.bins);
      count_key(valid, 0, &scratch.count);
    });
    if (one_rank && scratch.count >= wanted && (i + 1) % p.class_tiles == 0) {
      int64_t end = int64_t(tile.first_point + tile.num_points) * plan.args.num_classes;
      least = ranking_key(rank, uint32_t(end - 1)); // later tiles have nothing to add
    }
  }
  Bin bin = find_bin<kFinishThreads>(scratch.bins, wanted, scratch.scan.of_warps, &scratch.found);
  range->high = min(range->high, range->low + (uint64_t(bin.index + 1) << shift));
  range->low = max(range->low + (uint64_t(bin.index) << shift), least);
  return bin;
}

// Replaces an overflowed list; returns how many keys it has then.
template <class T>
__device__ unsigned replace_list(
    const Plan& plan, const Segment& segment, int level, int64_t image, FinishScratch& scratch) {
  Bin bin =
      find_bin<kFinishThreads>(segment.bins, segment.wanted, scratch.scan.of_warps, &scratch.found);
  if (bin.above + bin.inside <= segment.capacity) {
    return *segment.collected;
  }
  Range range = scan_range(bin.index);
  unsigned above = bin.above;
  uint32_t last = uint32_t(plan.args.levels.level[level].num_points() * plan.args.num_classes - 1);
  while (above + bin.inside > segment.capacity) {
    uint64_t least = ranking_key(uint32_t((range.high - 1) >> 32), last);
    if (range.low >> 32 == least >> 32) {
      range.low = max(range.low, least); // no index is larger
    }
    bin = narrow<T>(plan, level, image, segment.wanted - above, &range, scratch);
    above += bin.above;
  }
  if (threadIdx.x == 0) {
    scratch.count = 0;
  }
  __syncthreads();
  for (int i = 0; i < plan.level[level].tiles && scratch.count < above + bin.inside; ++i) {
    Tile tile = make_tile(plan, level, image, i);
    scan_tile<T>(plan, tile, range.low, scratch.scan, [&](bool valid, uint64_t key) {
      append(valid, key, segment.keys, segment.capacity, &scratch.count);
    });
  }
  return above + bin.inside;
}

__device__ void write_empty(const Plan& plan, int level, int64_t image, int64_t slot) {
  const SelectCandidates& args = plan.args;
  int64_t to = image * args.slots[args.levels.count] + args.slots[level] + slot;
  reinterpret_cast<float4*>(args.boxes)[to] = make_float4(0, 0, 0, 0);
  args.scores[to] = 0;
  args.classes[to] = -1;
}

template <class T>
__device__ void write_candidate(
    const Plan& plan, int level, int64_t image, int64_t slot, uint64_t key) {
  const SelectCandidates& args = plan.args;
  int64_t to = image * args.slots[args.levels.count] + args.slots[level] + slot;
  uint32_t index = ranking_index(key);
  int64_t point = index / unsigned(args.num_classes);
  int channel = int(index % unsigned(args.num_classes));
  float logit, ltrb[4], box[4];
  read_as<T, 1>(args.logits.level[level], image, channel, point, &logit);
  read<4>(args.ltrb.level[level], args.ltrb_dtype, image, point, ltrb);
  Scores scores = make_scores(logit, read_quality(plan, level, image, point));
  if (!make_box(args, level, image, point, ltrb, box)) {
    return write_empty(plan, level, image, slot);
  }
  reinterpret_cast<float4*>(args.boxes)[to] = make_float4(box[0], box[1], box[2], box[3]);
  args.scores[to] = score_of(args, scores.cls, scores.product);
  args.classes[to] = channel;
}

// There are fewer blocks than multiprocessors: none has to share its registers with another.
template <class T>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish_kernel(const __grid_constant__ Plan plan) {
  __shared__ FinishScratch scratch;
  __shared__ uint64_t sorted[kSortable];
  int num_levels = plan.args.levels.count;
  int level = int(blockIdx.x) % num_levels;
  int64_t image = blockIdx.x / num_levels;
  Segment segment = find_segment(plan, level, image);
  unsigned count = *segment.found;
  if (count > segment.capacity) {
    count = replace_list<T>(plan, segment, level, image, scratch);
  }
  uint64_t* keys = segment.keys;
  if (count <= kSortable) {
    for (unsigned i = threadIdx.x; i < count; i += kFinishThreads) {
      sorted[i] = segment.keys[i];
    }
    keys = sorted;
  }
  __syncthreads();
  sort_descending<kFinishThreads>(keys, count);
  // From the last to the first, for box i lies where the keys 2 i and 2 i + 1 may be.
  unsigned chunks = (segment.wanted + kFinishThreads - 1) / kFinishThreads;
  for (unsigned chunk = chunks; chunk > 0; --chunk) {
    unsigned slot = (chunk - 1) * kFinishThreads + threadIdx.x;
    uint64_t key = slot < count ? keys[slot] : 0;
    __syncthreads();
    if (slot < segment.wanted && slot < count) {
      write_candidate<T>(plan, level, image, slot, key);
    } else if (slot < segment.wanted) {
      write_empty(plan, level, image, slot);
    }
  }
}

// ---- the host's side ----

LevelPlan make_level(const SelectCandidates& args, const Map& map) {
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
cudaError_t make_plan(const SelectCandidates& args, unsigned* state, Plan* plan) {
  *plan = Plan{};
  plan->args = args;
  plan->state = state;
  int64_t total = 0;
  for (int l = args.levels.count - 1; l >= 0; --l) {
    plan->level[l] = make_level(args, args.logits.level[l]);
    int64_t blocks = args.num_images * plan->level[l].tiles;
    total += blocks;
    if (total > kMaxBlocks) {
      return cudaErrorInvalidConfiguration;
    }
    plan->blocks.append(blocks);
  }
  return args.num_images * args.levels.count > kMaxBlocks ? cudaErrorInvalidConfiguration
                                                          : cudaSuccess;
}

template <class T>
cudaError_t launch(const Plan& plan, cudaStream_t stream) {
  unsigned blocks = unsigned(plan.blocks.total());
  if (blocks > 0) {
    scan_kernel<T><<<blocks, kScanThreads, 0, stream>>>(plan);
    collect_kernel<T><<<blocks, kScanThreads, 0, stream>>>(plan);
  }
  unsigned segments = unsigned(plan.args.num_images * plan.args.levels.count);
  finish_kernel<T><<<segments, kFinishThreads, 0, stream>>>(plan);
  return cudaGetLastError();
}

} // namespace

int64_t select_candidates_state(const SelectCandidates& args) {
  return args.num_images * args.levels.count * kStateSize;
}

cudaError_t launch_select_candidates(
    const SelectCandidates& args, unsigned* state, cudaStream_t stream) {
  Plan plan;
  cudaError_t error = make_plan(args, state, &plan);
  int64_t words = select_candidates_state(args);
  if (error != cudaSuccess || words == 0) {
    return error;
  }
  error = cudaMemsetAsync(state, 0, size_t(words) * sizeof(unsigned), stream);
  if (error != cudaSuccess) {
    return error;
  }
  with_type(args.logits_dtype, [&](auto zero) { error = launch<decltype(zero)>(plan, stream); });
  return error;
}

} // namespace fcos::cuda
