// assign_targets: per box, visits only the few points that its sampling square covers.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops.h"

namespace fcos::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What the points of one level of one image know so far.
struct Best {
  std::vector<float> area;
  std::vector<int32_t> box;
  std::vector<uint8_t> candidates; // 0, 1 or 2 for "several"
  std::vector<uint8_t> ignored;

  explicit Best(int64_t points)
      : area(points, kInfinity), box(points, -1), candidates(points, 0), ignored(points, 0) {}
};

struct Window {
  int first, last; // inclusive
};

// Rows or columns whose coordinate may lie in (low, high); generous by one, the caller tests.
Window window(float low, float high, float origin, float pitch, int size) {
  if (!(pitch > 0)) {
    return {0, size - 1};
  }
  float limit = float(size);
  float first = std::floor((low - origin) / pitch) - 1, last = std::ceil((high - origin) / pitch) + 1;
  return {int(std::clamp(first, 0.f, limit)), int(std::clamp(last, -1.f, limit - 1))};
}

struct BoxOnLevel {
  const float* box;
  float center_x, center_y, near, area;
  bool ignored;
};

// False where the box can serve no point of the level.
bool describe(const AssignTargets& args, int level, int64_t index, BoxOnLevel* out) {
  const float* box = args.boxes + 4 * index;
  if (!(box[0] < box[2] && box[1] < box[3])) {
    return false; // no point lies strictly inside; also NaN
  }
  float near = args.center_radius * args.levels.level[level].stride;
  bool ignored = args.classes[index] == -1;
  *out = {
      box,
      (box[0] + box[2]) / 2,
      (box[1] + box[3]) / 2,
      args.center_radius > 0 && !ignored ? near : kInfinity,
      area(box),
      ignored};
  // The largest distance of an inner point to a side lies between half the longer side and all of
  // it; the margins cover rounding.
  float side = std::max(box[2] - box[0], box[3] - box[1]);
  const SizeRange& range = args.ranges[level];
  bool fits = side * 1.001f >= range.low && side * 0.499f <= range.high && std::isfinite(out->area);
  return ignored || fits;
}

void visit(const AssignTargets& args, int l, int64_t index, const BoxOnLevel& b, Best* best) {
  const Level& level = args.levels.level[l];
  Window columns = window(
      std::max(b.box[0], b.center_x - b.near), std::min(b.box[2], b.center_x + b.near),
      level.origin, level.pitch_x, level.width);
  Window rows = window(
      std::max(b.box[1], b.center_y - b.near), std::min(b.box[3], b.center_y + b.near),
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
        best->ignored[point] = 1;
        continue;
      }
      bool near = std::abs(x - b.center_x) < b.near && std::abs(y - b.center_y) < b.near;
      if (!near || !args.ranges[l].contains(longest(d))) {
        continue;
      }
      best->candidates[point] += best->candidates[point] < 2;
      if (b.area < best->area[point]) { // boxes come by index, so a tie keeps the lower one
        best->area[point] = b.area;
        best->box[point] = int32_t(index);
      }
    }
  }
}

void write(const AssignTargets& args, int64_t image, int l, const Best& best) {
  const Level& level = args.levels.level[l];
  int64_t first = image * args.levels.num_points + level.first_point;
  int32_t positives = 0, ambiguous = 0;
  for (int64_t point = 0; point < level.num_points(); ++point) {
    int32_t box = best.box[point];
    Ltrb<float> d = {0, 0, 0, 0};
    float quality = 0;
    int32_t label = best.ignored[point] ? -1 : args.num_classes;
    if (box >= 0) {
      int row = int(point / level.width), column = int(point % level.width);
      d = sides(level.x(column), level.y(row), args.boxes + 4 * int64_t(box));
      d = {d.left / level.stride, d.top / level.stride, d.right / level.stride,
           d.bottom / level.stride};
      quality = centerness(d);
      label = int32_t(args.classes[box]);
      ++positives;
      ambiguous += best.candidates[point] > 1;
    }
    args.labels[first + point] = label;
    args.matched[first + point] = box;
    args.centerness[first + point] = quality;
    float* ltrb = args.ltrb + 4 * (first + point);
    ltrb[0] = d.left, ltrb[1] = d.top, ltrb[2] = d.right, ltrb[3] = d.bottom;
  }
  int32_t* counts = args.counts + 2 * (image * args.levels.count + l);
  counts[0] = positives, counts[1] = ambiguous;
}

} // namespace

void assign_targets(const AssignTargets& args, ParallelFor parallel_for) {
  int64_t levels = args.levels.count;
  parallel_for(args.num_images * levels, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      int64_t image = item / levels;
      int level = int(item % levels);
      Best best(args.levels.level[level].num_points());
      for (int64_t i = args.offsets[image]; i < args.offsets[image + 1]; ++i) {
        BoxOnLevel box;
        if (describe(args, level, i, &box)) {
          visit(args, level, i, box, &best);
        }
      }
      write(args, image, level, best);
    }
  });
}

} // namespace fcos::cpu
