// select_candidates: the score rule becomes one bound on the logit per point, so that almost every
// logit costs one comparison, and the best of what exceeds it are found by the size of their keys.
//
// 1. scan_kernel reads all logits once. Candidates of a segment (one level of one image) go to a list
//    that may overflow, and are counted by rank.
// 2. collect_kernel reads the segments again whose list has overflowed. The counts say above which
//    rank the list is long enough but does not overflow.
// 3. finish_kernel sorts the list of a segment and writes boxes, scores and classes. Where more
//    candidates than the list can hold have all but the same rank, it first narrows the range of
//    keys down until they fit, reading the segment again each time.
//
// Keys are unique, so neither the order in which candidates come nor which of them a full list has
// missed changes a result. The lists lie where the boxes will be, the only other memory is for counts.

#include "select_candidates.h"

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
constexpr int kByRegisters = sizeof(T) == 2   ? 5
                             : sizeof(T) == 4 ? 4
                                              : 2;
template <class T>
constexpr int kMinBlocks = std::min(kByRegisters<T>, kThreadsOfMultiprocessor / kScanThreads);

constexpr int kTileSize = 8192;      // logits that a block looks at together
constexpr int kTilePoints = 512;     // at most; their classes, at most 128
constexpr unsigned kSortable = 2048; // keys that are sorted in shared memory

// What neighbouring points and classes of a level a block looks at together.
struct LevelPlan {
  int tile_points, tile_classes;
  int class_tiles; // that share their points
  int tiles;       // of an image
  bool columns_are_classes, is_vectorised;
};

struct Plan {
  SelectCandidates args;
  LevelPlan level[kMaxLevels];
  BlocksOfLevels blocks; // entry i is for the i-th last level
  unsigned* state;       // [B, L, kStateSize], zeros before the first kernel
};

// Rows and columns as they lie in memory: points and classes, or classes and points.
struct Tile {
  int level;
  int64_t image;
  int first_point, num_points, first_class, num_classes;

  __device__ unsigned rows(const LevelPlan& plan) const {
    return unsigned(plan.columns_are_classes ? num_points : num_classes);
  }
  __device__ unsigned columns(const LevelPlan& plan) const {
    return unsigned(plan.columns_are_classes ? num_classes : num_points);
  }
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

__device__ Tile find_tile(const Plan& plan, int block) {
  int entry = plan.blocks.level_of(block);
  int level = plan.args.levels.count - 1 - entry;
  int index = block - plan.blocks.first[entry];
  return make_tile(plan, level, index / plan.level[level].tiles, index % plan.level[level].tiles);
}

constexpr int kStateSize = int(kBins) + 2;

// One level of one image.
struct Segment {
  unsigned wanted;   // slots
  uint64_t* keys;    // the list, in the memory of the boxes of these slots
  unsigned capacity; // of the list
  unsigned* found;   // by the scan; more than the capacity if the list has overflowed
  unsigned* collected;
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
      unsigned(wanted), reinterpret_cast<uint64_t*>(boxes), unsigned(capacity), state, state + 1,
      state + 2,
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

__device__ int64_t offset(const Layout& layout, int64_t image, int channel, int64_t point) {
  return image * layout.image + channel * layout.channel + point * layout.point;
}

__device__ float read(const Map& map, DType dtype, int64_t image, int channel, int64_t point) {
  int64_t at = offset(map.data_layout, image, channel, point);
  switch (dtype) {
    case DType::kHalf:
      return widen(static_cast<const __half*>(map.data)[at]);
    case DType::kBFloat16:
      return widen(static_cast<const __nv_bfloat16*>(map.data)[at]);
    case DType::kDouble:
      return float(static_cast<const double*>(map.data)[at]);
    default:
      return static_cast<const float*>(map.data)[at];
  }
}

// One (point, class) pair.
struct Scores {
  float cls, both;
};

template <class T>
__device__ Scores
score_pair(const Plan& plan, int level, int64_t image, int64_t point, int channel, float quality) {
  const Map& map = plan.args.logits.level[level];
  const T* data = static_cast<const T*>(map.data);
  float cls = sigmoid(float(widen(data[offset(map.data_layout, image, channel, point)])));
  return {cls, product(cls, quality)};
}

__device__ float read_quality(const Plan& plan, int level, int64_t image, int64_t point) {
  const SelectCandidates& args = plan.args;
  return sigmoid(read(args.quality.level[level], args.quality_dtype, image, 0, point));
}

// ---- looking through a tile ----

template <int Threads>
struct Scratch {
  alignas(16) float bound[kTilePoints]; // of every point
  float quality[kTilePoints];
  uint16_t survivors[kTileSize];
  unsigned of_warps[Threads / 32];
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
template <class T, int V, int Threads>
__device__ uint32_t find_survivors(const Plan& plan, const Tile& tile, const float* bound) {
  constexpr int kTurns = kTileSize / Threads / V;
  constexpr int kAtOnce = kTurns < 4 ? kTurns : 4;
  static_assert(kTurns * V <= 32);
  const Map& map = plan.args.logits.level[tile.level];
  const LevelPlan& level = plan.level[tile.level];
  const Layout& layout = map.data_layout;
  int64_t row_step = level.columns_are_classes ? layout.point : layout.channel;
  int64_t column_step = V > 1 ? 1 : level.columns_are_classes ? layout.channel : layout.point;
  const T* data = static_cast<const T*>(map.data) +
                  offset(layout, tile.image, tile.first_class, tile.first_point);
  unsigned rows = tile.rows(level), per_row = tile.columns(level) / V;
  unsigned row = threadIdx.x / per_row, vector = threadIdx.x % per_row;
  unsigned down = Threads / per_row, right = Threads % per_row;
  uint32_t survivors = 0;
#pragma unroll 1
  for (int turn = 0; turn < kTurns && row < rows; turn += kAtOnce) {
    Vector<T, V> logits[kAtOnce];
    unsigned rows_of[kAtOnce], vectors_of[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) { // all are on their way before the first is looked at
      rows_of[k] = row, vectors_of[k] = vector;
      if (row < rows) {
        logits[k] = load<T, V>(data + row * row_step + vector * V * column_step, false);
      }
      row += down, vector += right;
      if (vector >= per_row) {
        vector -= per_row, ++row;
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (rows_of[k] < rows) {
        typename Compute<T>::Type x[V];
        unpack<T, V>(logits[k], x);
        float limit[V];
        load_bounds<V>(bound, level.columns_are_classes, rows_of[k], vectors_of[k], limit);
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

// Lists the elements of the tile (row-major) that exceed their bounds; returns how many.
template <class T, int V, int Threads>
__device__ unsigned list_survivors(const Plan& plan, const Tile& tile, Scratch<Threads>& scratch) {
  uint32_t survivors = find_survivors<T, V, Threads>(plan, tile, scratch.bound);
  if (!__syncthreads_or(survivors != 0)) {
    return 0;
  }
  unsigned total;
  unsigned at = sum_before<Threads>(unsigned(__popc(survivors)), scratch.of_warps, &total);
  for (; survivors != 0; survivors &= survivors - 1) {
    unsigned bit = unsigned(__ffs(int(survivors))) - 1;
    scratch.survivors[at++] = uint16_t((bit / V * Threads + threadIdx.x) * V + bit % V);
  }
  __syncthreads();
  return total;
}

// Calls take(valid, key) for the candidates of the tile with keys of `low` and more. The lanes of a
// warp call it together, some with nothing valid.
template <class T, int Threads, class Take>
__device__ void scan_tile(
    const Plan& plan, const Tile& tile, uint64_t low, Scratch<Threads>& scratch, Take&& take) {
  constexpr int V = kVectorBytes / sizeof(T);
  const SelectCandidates& args = plan.args;
  const LevelPlan& level = plan.level[tile.level];
  float lowest = probability_of(uint32_t(low >> 32)) * (1 - 1e-6f);
  for (int p = int(threadIdx.x); p < tile.num_points; p += Threads) {
    float quality = read_quality(plan, tile.level, tile.image, tile.first_point + p);
    scratch.quality[p] = quality;
    scratch.bound[p] = bound_of(args, quality, lowest);
  }
  __syncthreads();
  unsigned total = level.is_vectorised ? list_survivors<T, V, Threads>(plan, tile, scratch)
                                       : list_survivors<T, 1, Threads>(plan, tile, scratch);
  unsigned columns = tile.columns(level);
  for (unsigned first = 0; first < total; first += Threads) {
    bool valid = first + threadIdx.x < total;
    uint64_t key = 0;
    if (valid) {
      unsigned element = scratch.survivors[first + threadIdx.x];
      int row = int(element / columns), column = int(element % columns);
      int p = level.columns_are_classes ? row : column;
      int channel = tile.first_class + (level.columns_are_classes ? column : row);
      int64_t point = tile.first_point + p;
      Scores scores =
          score_pair<T>(plan, tile.level, tile.image, point, channel, scratch.quality[p]);
      float rank = rank_of(args, scores.cls, scores.both);
      key = ranking_key(probability_bits(rank), uint32_t(point * args.num_classes + channel));
      valid = passes(args, scores.cls, scores.both) && key >= low;
    }
    take(valid, key);
  }
  __syncthreads();
}

// ---- the kernels ----

template <class T>
__global__ void __launch_bounds__(kScanThreads, kMinBlocks<T>)
    scan_kernel(const __grid_constant__ Plan plan) {
  __shared__ Scratch<kScanThreads> scratch;
  __shared__ unsigned bins[kBins];
  __shared__ bool is_full;
  Tile tile = find_tile(plan, int(blockIdx.x));
  Segment segment = find_segment(plan, tile.level, tile.image);
  if (threadIdx.x == 0) { // then there is no need to queue up for the list
    is_full = *static_cast<volatile unsigned*>(segment.found) > segment.capacity;
  }
  clear_bins<kScanThreads>(bins);
  bool full = is_full;
  unsigned taken = 0;
  scan_tile<T>(plan, tile, 0, scratch, [&](bool valid, uint64_t key) {
    count_key(valid, scan_bin(key), bins);
    taken += valid;
    if (!full) {
      unsigned found = append(valid, key, segment.keys, segment.capacity, segment.found);
      full = found > segment.capacity;
    }
  });
  if (!__syncthreads_or(taken != 0)) {
    return;
  }
  for (unsigned i = threadIdx.x; i < kBins; i += kScanThreads) {
    if (bins[i] != 0) {
      atomicAdd(&segment.bins[i], bins[i]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kScanThreads, kMinBlocks<T>)
    collect_kernel(const __grid_constant__ Plan plan) {
  __shared__ Scratch<kScanThreads> scratch;
  __shared__ Bin found;
  Tile tile = find_tile(plan, int(blockIdx.x));
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

template <class T>
__device__ void write_candidate(
    const Plan& plan, int level, int64_t image, int64_t slot, uint64_t key) {
  const SelectCandidates& args = plan.args;
  int64_t to = image * args.slots[args.levels.count] + args.slots[level] + slot;
  uint32_t index = ranking_index(key);
  int64_t point = index / unsigned(args.num_classes);
  int channel = int(index % unsigned(args.num_classes));
  float quality = read_quality(plan, level, image, point);
  Scores scores = score_pair<T>(plan, level, image, point, channel, quality);
  float ltrb[4], box[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    ltrb[c] = read(args.ltrb.level[level], args.ltrb_dtype, image, c, point);
  }
  decode_box(args.levels.level[level], point, ltrb, box);
  if (args.clip) {
    clip_box(float(args.image_sizes[2 * image]), float(args.image_sizes[2 * image + 1]), box);
  }
  reinterpret_cast<float4*>(args.boxes)[to] = make_float4(box[0], box[1], box[2], box[3]);
  args.scores[to] = score_of(args, scores.cls, scores.both);
  args.classes[to] = channel;
}

__device__ void write_empty(const Plan& plan, int level, int64_t image, int64_t slot) {
  const SelectCandidates& args = plan.args;
  int64_t to = image * args.slots[args.levels.count] + args.slots[level] + slot;
  reinterpret_cast<float4*>(args.boxes)[to] = make_float4(0, 0, 0, 0);
  args.scores[to] = 0;
  args.classes[to] = -1;
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
  int64_t parts = divide_up(classes, 128);
  plan.tile_classes = int(parts == 1 ? classes : divide_up(divide_up(classes, parts), 16) * 16);
  plan.class_tiles = int(divide_up(classes, plan.tile_classes));
  plan.tile_points = std::min(kTilePoints, kTileSize / plan.tile_classes / 32 * 32);
  plan.tiles = int(divide_up(points, plan.tile_points)) * plan.class_tiles;
  const Layout& layout = map.data_layout;
  plan.columns_are_classes = layout.channel == 1 && layout.point != 1;
  int64_t row_step = plan.columns_are_classes ? layout.point : layout.channel;
  int64_t column_step = plan.columns_are_classes ? layout.channel : layout.point;
  int64_t columns = plan.columns_are_classes ? classes : points;
  int64_t vector = kVectorBytes / bytes_of(args.logits_dtype);
  plan.is_vectorised = column_step == 1 && row_step % vector == 0 && layout.image % vector == 0 &&
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
    FCOS_LAUNCH(scan_kernel<T>, blocks, kScanThreads, 0, stream, plan);
    FCOS_LAUNCH(collect_kernel<T>, blocks, kScanThreads, 0, stream, plan);
  }
  unsigned segments = unsigned(plan.args.num_images * plan.args.levels.count);
  FCOS_LAUNCH(finish_kernel<T>, segments, kFinishThreads, 0, stream, plan);
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
