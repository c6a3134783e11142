// Geometry of the pyramid's points; mirrors fcos_d2/ops/levels.py.
//
// B images, L levels, P points of all levels together (level-major, row-major inside a level).
#pragma once

#include "platform.h"

namespace fcos {

constexpr int kMaxLevels = 8;

struct Level {
  int height, width;      // in points
  int64_t first_point;    // of this level among the P points
  float stride;           // unit of ltrb, in pixels
  float pitch_x, pitch_y; // between points, in pixels
  float origin;           // x and y of the first point, in pixels

  FCOS_HD float x(int column) const { return float(column) * pitch_x + origin; }
  FCOS_HD float y(int row) const { return float(row) * pitch_y + origin; }
  FCOS_HD int64_t num_points() const { return int64_t(height) * width; }
};

struct Levels {
  int count;          // L
  int64_t num_points; // P
  Level level[kMaxLevels];
};

} // namespace fcos
