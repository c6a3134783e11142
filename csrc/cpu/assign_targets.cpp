// assign_targets: for each box, visits only the few points that its sampling square covers.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "ops.h"

namespace fcos::cpu {
namespace {

constexpr int64_t kGrain = 65536;     // minimum points per thread, about 0.1 ms
constexpr int64_t kPointsPerBox = 16; // points that cost as much as a box
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One level of one image: its outputs, initially background, and the state of its points.
struct LevelOfImage {
  const AssignTargets& args;
  const Level& level;
  const SizeRange& range;
  int32_t *labels, *matched, *counts;
  float *ltrb, *centerness;
  std::vector<float> area;         // of the smallest qualifying box
  std::vector<uint8_t> candidates; // qualifying boxes per point, at most 2
  std::vector<int32_t> positives;  // indices of points

  LevelOfImage(const AssignTargets& args, int64_t image, int l)
      : args(args),
        level(args.levels.level[l]),
        range(args.ranges[l]),
        area(level.num_points(), kInfinity),
        candidates(level.num_points(), 0) {
    int64_t first = image * args.levels.num_points + level.first_point;
    labels = args.labels + first, matched = args.matched + first;
    ltrb = args.ltrb + 4 * first, centerness = args.centerness + first;
    counts = args.counts + 2 * (image * args.levels.count + l);
    std::fill_n(labels, level.num_points(), args.num_classes);
    std::fill_n(matched, level.num_points(), -1);
    std::fill_n(ltrb, 4 * level.num_points(), 0.0f);
    std::fill_n(centerness, level.num_points(), 0.0f);
  }

  Ltrb<float> sides_of(int64_t point, const float* box) const {
    int row = int(point / level.width), column = int(point % level.width);
    return sides(level.x(column), level.y(row), box);
  }
};

struct Window {
  int first, last; // inclusive
};

// Rows or columns whose coordinates may lie in (low, high); conservative, since the caller tests.
Window window(float low, float high, float origin, float pitch, int size) {
  if (!(pitch > 0)) {
    return {0, size - 1};
  }
  double margin = 1 + size * 0x1p-22; // a coordinate is rounded three times, to 24 bits
  double first = (double(low) - origin) / pitch - margin;
  double last = (double(high) - origin) / pitch + margin;
  return {int(std::clamp(first, 0., double(size))), int(std::clamp(last, -1., size - 1.))};
}

struct BoxOnLevel {
  const float* box;
  float center_x, center_y, radius, area;
  bool ignored;
};

// Returns false if no point of the level can match the box.
bool prepare_box(const LevelOfImage& on, int64_t index, BoxOnLevel* out) {
  const AssignTargets& args = on.args;
  const float* box = args.boxes + 4 * index;
  if (!(box[0] < box[2] && box[1] < box[3])) {
    return false; // no point lies strictly inside; also NaN
  }
  float radius = args.center_radius * on.level.stride;
  bool ignored = args.classes[index] == -1;
  *out = {
      box,
      (box[0] + box[2]) / 2,
      (box[1] + box[3]) / 2,
      args.center_radius > 0 && !ignored ? radius : kInfinity,
      area(box, args.pixel_extent),
      ignored};
  // The largest distance from an inner point to a side is between half the longer side and the
  // whole of it; the margins cover rounding.
  float side = std::max(box[2] - box[0], box[3] - box[1]);
  bool fits =
      side * 1.001f >= on.range.low && side * 0.499f <= on.range.high && std::isfinite(out->area);
  return ignored || fits;
}

void match_points(int64_t index, const BoxOnLevel& b, LevelOfImage* on) {
  const Level& level = on->level;
  Window columns = window(
      std::max(b.box[0], b.center_x - b.radius), std::min(b.box[2], b.center_x + b.radius),
      level.origin, level.pitch_x, level.width);
  Window rows = window(
      std::max(b.box[1], b.center_y - b.radius), std::min(b.box[3], b.center_y + b.radius),
      level.origin, level.pitch_y, level.height);
  for (int row = rows.first; row <= rows.last; ++row) {
    for (int column = columns.first; column <= columns.last; ++column) {
      float x = level.x(column), y = level.y(row);
      Ltrb<float> d = sides(x, y, b.box);
      if (!strictly_inside(d)) {
        continue;
      }
      int64_t point = int64_t(row) * level.width + column;
      if (b.ignored) {
        on->labels[point] = -1; // until a box claims the point
        continue;
      }
      bool near = std::abs(x - b.center_x) < b.radius && std::abs(y - b.center_y) < b.radius;
      if (!near || !on->range.contains(longest(d))) {
        continue;
      }
      if (on->candidates[point] == 0) {
        on->positives.push_back(int32_t(point));
      }
      on->candidates[point] += on->candidates[point] < 2;
      if (b.area < on->area[point]) { // boxes are visited by index, so ties keep the lower one
        on->area[point] = b.area;
        on->matched[point] = int32_t(index);
      }
    }
  }
}

// Returns the sum of the centerness of positive points.
double write_positives(const LevelOfImage& on) {
  int32_t ambiguous = 0;
  double total = 0;
  for (int32_t point : on.positives) {
    int64_t box = on.matched[point];
    Ltrb<float> d = on.sides_of(point, on.args.boxes + 4 * box);
    float stride = on.level.stride;
    d = {d.left / stride, d.top / stride, d.right / stride, d.bottom / stride};
    on.labels[point] = int32_t(on.args.classes[box]);
    total += on.centerness[point] = centerness(d);
    float* ltrb = on.ltrb + 4 * int64_t(point);
    ltrb[0] = d.left, ltrb[1] = d.top, ltrb[2] = d.right, ltrb[3] = d.bottom;
    ambiguous += on.candidates[point] > 1;
  }
  on.counts[0] = int32_t(on.positives.size()), on.counts[1] = ambiguous;
  return total;
}

} // namespace

void assign_targets(const AssignTargets& args, ParallelFor parallel_for) {
  int64_t levels = args.levels.count, items = args.num_images * levels;
  int64_t work = args.num_images * args.levels.num_points + kPointsPerBox * args.num_boxes;
  std::vector<double> centerness(items); // so the order of summation is fixed
  parallel_for(items, 1 + kGrain * items / (work + 1), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      int64_t image = item / levels;
      LevelOfImage on(args, image, int(item % levels));
      for (int64_t i = args.offsets[image]; i < args.offsets[image + 1]; ++i) {
        BoxOnLevel box;
        if (prepare_box(on, i, &box)) {
          match_points(i, box, &on);
        }
      }
      centerness[item] = write_positives(on);
    }
  });
  int64_t positives = 0;
  for (int64_t item = 0; item < items; ++item) {
    positives += args.counts[2 * item];
  }
  args.totals[0] = float(positives);
  args.totals[1] = float(std::accumulate(centerness.begin(), centerness.end(), 0.0));
}

} // namespace fcos::cpu
