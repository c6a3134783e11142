// What the kernels of select_candidates share: tiles of the logits, the keys of candidates, and how a
// block searches a tile.
#pragma once

#include <algorithm>

#include "../core/ranking.h"
#include "../core/scores.h"
#include "block.h"
#include "launch.h"
#include "numbers.h"

namespace fcos::cuda {

constexpr int kScanThreads = 256, kFinishThreads = 512;

constexpr int kTileSize = 8192;               // logits that a block processes together
constexpr int kPointBits = 9, kClassBits = 7; // of the 16 that index a logit of a tile
constexpr int kTilePoints = 1 << kPointBits;  // at most
constexpr int kTileClasses = 1 << kClassBits; // at most
constexpr unsigned kSortable = 2048;          // keys that are sorted in shared memory

constexpr unsigned kCollectBlocks = 264; // read segments with overflowed lists again

// Longer lists are shortened before they are sorted.
FCOS_HD int64_t longest_sorted(int64_t wanted) { return max_of(int64_t(kSortable), 2 * wanted); }

// A list has room for that many keys and a tile more, or for this share of a segment if it is larger:
// more candidates are rare.
constexpr int64_t kListShare = 64;

// How a level is divided into tiles of neighboring points and classes, one per block.
struct LevelPlan {
  int tile_points, tile_classes;
  int class_tiles;   // tiles with the same points
  int tiles;         // per image
  unsigned capacity; // of a segment's list
  int64_t first_key; // where that list starts among the keys of an image
  bool columns_are_classes, is_vectorised;

  __device__ unsigned column_bits() const { return columns_are_classes ? kClassBits : kPointBits; }
};

// What the blocks of a segment share. It is all zeros before the first kernel.
struct State {
  unsigned found;                 // by the scan; exceeds the capacity if the list has overflowed
  unsigned collected, tiles_done; // by finish_kernel, if it has
  unsigned lowest_bin;            // that still matters; bins below it do not count all candidates
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
  unsigned* overflowed; // [1 + B L]: how many lists have overflowed, then whose
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

// Blocks that run at the same time cover all images, so that the counts of each help early.
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

// Bits in the order of probabilities, with finer steps towards 0 and towards 1, where the scores of
// confident networks are.
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

template <int N>
__device__ void read(const Map& map, DType dtype, int64_t image, int64_t point, float* out) {
  with_type(dtype, [&](auto zero) { read<decltype(zero), N>(map, image, 0, point, out); });
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

// ---- searching a tile ----

template <int Threads>
struct Scratch : Histogram<Threads> {
  alignas(16) float bound[kTilePoints]; // of every point
  float quality[kTilePoints];
  uint16_t survivors[kTileSize]; // row << column_bits | column, in any order
  unsigned num_survivors;
};

// A tile in memory order: rows of points with columns of classes, or vice versa.
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

// The vectors of a tile that a thread processes: every Threads-th.
template <int Threads>
struct TileCursor {
  unsigned per_row, down, right, row, vector;

  __device__ explicit TileCursor(unsigned vectors_per_row)
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
  TileCursor<Threads> cursor(tile.columns / V);
  uint32_t survivors = 0;
#pragma unroll 1
  for (int turn = 0; turn < kTurns && cursor.row < tile.rows; turn += kAtOnce) {
    Vector<T, V> logits[kAtOnce];
    unsigned rows_of[kAtOnce], vectors_of[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) { // all loads start before the first value is used
      rows_of[k] = cursor.row, vectors_of[k] = cursor.vector;
      if (cursor.row < tile.rows) {
        logits[k] = load<T, V>(
            tile.data + cursor.row * tile.row_step + cursor.vector * V * column_step, false);
      }
      cursor.next();
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
  for (TileCursor<Threads> cursor(tile.columns / V); survivors != 0;
       survivors >>= V, cursor.next()) {
    unsigned first = cursor.row << level.column_bits() | cursor.vector * V;
    for (uint32_t bits = survivors & ((1u << V) - 1); bits != 0; bits &= bits - 1) {
      scratch.survivors[at++] = uint16_t(first + unsigned(__ffs(int(bits))) - 1);
    }
  }
  __syncthreads();
  return scratch.num_survivors;
}

// Reads all qualities first, because `low` may still be loading.
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

// Lists possible candidates with keys of at least `low`; returns how many.
template <class T, int Threads>
__device__ unsigned find_survivors(
    const Plan& plan, const Tile& tile, uint64_t low, Scratch<Threads>& scratch) {
  make_bounds(plan, tile, low, scratch);
  const LevelPlan& level = plan.level[tile.level];
  Rows<T> rows = make_rows<T>(plan, tile);
  return level.is_vectorised
             ? list_survivors<kVectorBytes / int(sizeof(T)), Threads>(rows, level, scratch)
             : list_survivors<1, Threads>(rows, level, scratch);
}

// Calls visit(valid, key) for all `count` survivors; those that are candidates with keys of at least
// `low` are valid. All lanes of a warp call it together.
template <class T, int Threads, class Visit>
__device__ void for_each_survivor(
    const Plan& plan, const Tile& tile, uint64_t low, unsigned count, Scratch<Threads>& scratch,
    Visit&& visit) {
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
    visit(valid, key);
  }
  __syncthreads();
}

} // namespace fcos::cuda
