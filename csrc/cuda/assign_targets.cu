// assign_targets: all images and levels in one launch, in memory that does not depend on M.
//
// A block owns a tile of 32 x 8 points of one level of one image. First, each thread checks a box of
// the image, and boxes that may match a point of the tile (2 of 100 on average) go to shared memory.
// Then each thread owns a point and applies the rule to these boxes. Their order in shared memory
// depends on the hardware, but the winner, the smallest (area, index), does not. The last block to
// finish sums the counts of all blocks.
//
// Every product that is added to something here is exact, so it does not matter if the compiler uses
// an FMA: results equal the reference bit for bit.

#include "ops.h"

#include <algorithm>

#include "launch.h"
#include "sums.h"

namespace fcos::cuda {
namespace {

constexpr int kTileWidth = 32, kTileHeight = kThreads / kTileWidth;
constexpr int kMinBlocks = kThreadsOfMultiprocessor / kThreads; // mostly 6: at most 40 registers

struct Tile {
  int image, level;
  int column, row; // of its first point
};

// A box, relative to the points of a tile.
struct alignas(16) Survivor {
  float box[4];
  float area;
  int index;
  bool ignored;
};

// The match of a point so far.
struct Choice {
  float area = INFINITY;
  int index = -1;
  int candidates = 0;
  bool in_ignored = false;
};

// The contribution of a tile to the sums.
struct Tally {
  int positive, ambiguous; // points
  double centerness;
};

__device__ Tile find_tile(const AssignTargets& args, const BlocksOfLevels& tiles, unsigned block) {
  unsigned image = block / unsigned(tiles.total());
  int tile = int(block - image * unsigned(tiles.total()));
  int level = tiles.level_of(tile);
  int across = (args.levels.level[level].width + kTileWidth - 1) / kTileWidth;
  int index = tile - tiles.first[level];
  return {int(image), level, index % across * kTileWidth, index / across * kTileHeight};
}

// Distance from a box's center to the interval [first, last], 0 or less inside. Rounding is
// monotonic, so no point of the interval is computed to be closer.
__device__ float gap(float low, float high, float first, float last) {
  float center = (low + high) / 2;
  return fmaxf(first - center, center - last);
}

// False if no point of the tile can match the box or be ignored for it; also for NaN.
__device__ bool may_serve(const AssignTargets& args, const Tile& tile, const Survivor& s) {
  const Level& level = args.levels.level[tile.level];
  const float* box = s.box;
  float first_x = level.x(tile.column), first_y = level.y(tile.row);
  float last_x = level.x(min(tile.column + kTileWidth, level.width) - 1);
  float last_y = level.y(min(tile.row + kTileHeight, level.height) - 1);
  if (!(box[0] < last_x && box[2] > first_x && box[1] < last_y && box[3] > first_y)) {
    return false;
  }
  if (s.ignored) {
    return true;
  }
  // The largest distance of an inner point to a side is between half of the longer side and all of
  // it, even after rounding.
  const SizeRange& range = args.ranges[tile.level];
  float longer = fmaxf(box[2] - box[0], box[3] - box[1]);
  bool fits = s.area < INFINITY && longer >= range.low && longer / 2 <= range.high;
  float radius = args.center_radius * level.stride;
  bool near = radius <= 0 || (gap(box[0], box[2], first_x, last_x) < radius &&
                              gap(box[1], box[3], first_y, last_y) < radius);
  return fits && near;
}

// Checks one box, and appends it to the survivors if it may match a point of the tile.
__device__ void load_box(
    const AssignTargets& args, const Tile& tile, int index, Survivor* survivors, int* count) {
  int64_t label = args.classes[index];
  FCOS_ASSERT(
      label >= -1 && label < args.num_classes,
      "assign_targets: gt_classes must lie in [-1, num_classes); -1 is an ignored region, other "
      "values need a larger num_classes");
  const float* box = args.boxes + 4 * int64_t(index);
  Survivor s = {{box[0], box[1], box[2], box[3]}, area(box, args.pixel_extent), index, label == -1};
  if (may_serve(args, tile, s)) {
    survivors[atomicAdd(count, 1)] = s;
  }
}

// The rule (1904.01355 section 3.1) for the point (x, y) and one box.
__device__ void consider(
    const Survivor& s, float x, float y, float radius, const SizeRange& range, Choice* choice) {
  Ltrb<float> d = sides(x, y, s.box);
  if (!strictly_inside(d)) {
    return;
  }
  if (s.ignored) {
    choice->in_ignored = true;
    return;
  }
  float center_x = (s.box[0] + s.box[2]) / 2, center_y = (s.box[1] + s.box[3]) / 2;
  bool near = radius <= 0 || (fabsf(x - center_x) < radius && fabsf(y - center_y) < radius);
  if (!near || !range.contains(longest(d))) {
    return;
  }
  ++choice->candidates;
  if (s.area < choice->area || (s.area == choice->area && s.index < choice->index)) {
    choice->area = s.area;
    choice->index = s.index;
  }
}

// Returns the centerness of the point.
__device__ float write(
    const AssignTargets& args, const Level& level, int64_t to, float x, float y, Choice choice) {
  Ltrb<float> d = {0, 0, 0, 0};
  int label = choice.in_ignored ? -1 : args.num_classes;
  float quality = 0;
  if (choice.index >= 0) {
    d = sides(x, y, args.boxes + 4 * int64_t(choice.index));
    d = {
        d.left / level.stride, d.top / level.stride, d.right / level.stride,
        d.bottom / level.stride};
    quality = centerness(d);
    label = int(args.classes[choice.index]);
  }
  args.labels[to] = label;
  args.matched[to] = choice.index;
  reinterpret_cast<float4*>(args.ltrb)[to] = make_float4(d.left, d.top, d.right, d.bottom);
  args.centerness[to] = quality;
  return quality;
}

__device__ void check_offsets(const AssignTargets& args, int image, int64_t begin, int64_t end) {
  bool rises = begin >= 0 && begin <= end && end <= args.num_boxes;
  bool first = image > 0 || begin == 0;
  bool last = image + 1 < args.num_images || end == args.num_boxes;
  FCOS_ASSERT(
      rises && first && last, "assign_targets: gt_offsets must rise from 0 to the number of boxes");
}

// Valid in thread 0.
__device__ Tally assign_tile(const AssignTargets& args, const BlocksOfLevels& tiles) {
  __shared__ Survivor survivors[kThreads];
  __shared__ int count;
  Tile tile = find_tile(args, tiles, blockIdx.x);
  int64_t begin = args.offsets[tile.image], end = args.offsets[tile.image + 1];
  check_offsets(args, tile.image, begin, end);

  const Level& level = args.levels.level[tile.level];
  int column = tile.column + int(threadIdx.x) % kTileWidth;
  int row = tile.row + int(threadIdx.x) / kTileWidth;
  bool on_map = column < level.width && row < level.height;
  float x = level.x(column), y = level.y(row);
  float radius = args.center_radius * level.stride;
  Choice choice;
  for (int first = int(begin); first < end; first += kThreads) {
    if (threadIdx.x == 0) {
      count = 0;
    }
    __syncthreads();
    if (first + int(threadIdx.x) < end) {
      load_box(args, tile, first + int(threadIdx.x), survivors, &count);
    }
    __syncthreads();
    for (int i = 0; i < count && on_map; ++i) {
      consider(survivors[i], x, y, radius, args.ranges[tile.level], &choice);
    }
    __syncthreads();
  }

  double quality = 0;
  if (on_map) {
    int64_t point = level.first_point + int64_t(row) * level.width + column;
    quality = write(args, level, tile.image * args.levels.num_points + point, x, y, choice);
  }
  int positive = __syncthreads_count(choice.candidates > 0);
  if (positive == 0) {
    return {0, 0, 0};
  }
  int ambiguous = __syncthreads_count(choice.candidates > 1);
  return {positive, ambiguous, block_sum<0>(quality)};
}

// Each warp sums a level of an image.
__device__ void add_tallies(
    const AssignTargets& args, const BlocksOfLevels& tiles, const Tally* tallies) {
  int lane = lane_index(), warp = int(threadIdx.x) / 32, levels = args.levels.count;
  double positive = 0, centerness = 0;
  for (int64_t i = warp; i < args.num_images * levels; i += kThreads / 32) {
    const Tally* of_image = tallies + i / levels * tiles.total();
    int level = int(i % levels), of_level[2] = {0, 0};
#pragma unroll 2 // more need more than 40 registers
    for (int tile = tiles.first[level] + lane; tile < tiles.first[level + 1]; tile += 32) {
      const Tally& tally = of_image[tile];
      of_level[0] += tally.positive, of_level[1] += tally.ambiguous;
      centerness += tally.centerness;
    }
    positive += of_level[0];
    for (int step = 16; step > 0; step /= 2) {
      of_level[0] += __shfl_down_sync(kAllLanes, of_level[0], step);
      of_level[1] += __shfl_down_sync(kAllLanes, of_level[1], step);
    }
    if (lane == 0) {
      args.counts[2 * i] = of_level[0], args.counts[2 * i + 1] = of_level[1];
    }
  }
  positive = block_sum<0>(positive);
  centerness = block_sum<1>(centerness);
  if (threadIdx.x == 0) {
    args.totals[0] = float(positive), args.totals[1] = float(centerness);
  }
}

__global__ void __launch_bounds__(kThreads, kMinBlocks) assign_kernel(
    const __grid_constant__ AssignTargets args, const __grid_constant__ BlocksOfLevels tiles,
    Tally* tallies, unsigned ticket) {
  if (blockIdx.x < args.num_images * tiles.total()) { // there may be none
    Tally tally = assign_tile(args, tiles);
    if (threadIdx.x == 0) {
      tallies[blockIdx.x] = tally;
    }
  }
  if (is_last_block(ticket)) {
    add_tallies(args, tiles, tallies);
  }
}

BlocksOfLevels tiles_of(const Levels& levels) {
  BlocksOfLevels tiles;
  for (int l = 0; l < levels.count; ++l) {
    const Level& level = levels.level[l];
    tiles.append(divide_up(level.width, kTileWidth) * divide_up(level.height, kTileHeight));
  }
  return tiles;
}

} // namespace

int64_t assign_targets_state(const AssignTargets& args) {
  constexpr int64_t kDoubles = sizeof(Tally) / sizeof(double);
  return kDoubles * args.num_images * tiles_of(args.levels).total();
}

cudaError_t launch_assign_targets(const AssignTargets& args, double* state, cudaStream_t stream) {
  unsigned ticket;
  cudaError_t error = take_ticket(stream, &ticket);
  BlocksOfLevels tiles = tiles_of(args.levels);
  int64_t blocks = std::max<int64_t>(args.num_images * tiles.total(), 1);
  if (error != cudaSuccess || args.levels.num_points > kMaxBlocks || blocks > kMaxBlocks) {
    return error != cudaSuccess ? error : cudaErrorInvalidConfiguration;
  }
  assign_kernel<<<unsigned(blocks), kThreads, 0, stream>>>(
      args, tiles, reinterpret_cast<Tally*>(state), ticket);
  return cudaGetLastError();
}

} // namespace fcos::cuda
