// Points and boxes: assignment rule, centerness, and the IoU family with gradients.
//
// Expressions keep the order of operations of fcos_d2/ops/reference, so float32 results agree
// bitwise where operations are exact or correctly rounded (assignment), else up to rounding.
#pragma once

#include "levels.h"

namespace fcos {

// Distances from a point to the sides of a box.
template <class T>
struct Ltrb {
  T left, top, right, bottom;
};

template <class T>
FCOS_HD T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FCOS_HD T max_of(T a, T b) {
  return a < b ? b : a;
}

FCOS_HD Ltrb<float> sides(float x, float y, const float* box) {
  return {x - box[0], y - box[1], box[2] - x, box[3] - y};
}

// False if a distance is NaN or not positive.
FCOS_HD bool strictly_inside(const Ltrb<float>& d) {
  return d.left > 0 && d.top > 0 && d.right > 0 && d.bottom > 0;
}

FCOS_HD float longest(const Ltrb<float>& d) {
  return max_of(max_of(d.left, d.top), max_of(d.right, d.bottom));
}

FCOS_HD float area(const float* box) { return mul_rn(box[2] - box[0], box[3] - box[1]); }
FCOS_HD float area(const float* box, float pixel_extent) {
  return mul_rn(box[2] + pixel_extent - box[0], box[3] + pixel_extent - box[1]);
}

// Areas of intersection and union of two boxes. With a NaN coordinate the union is NaN, and all
// comparisons are false.
struct Overlap {
  float inter, union_area;

  FCOS_HD bool exceeds(float iou_threshold) const {
    return inter > mul_rn(iou_threshold, union_area);
  }
  FCOS_HD float iou() const { return union_area > 0 ? inter / union_area : 0.0f; }
};

FCOS_HD Overlap overlap(
    float ax1, float ay1, float ax2, float ay2, float a_area, float bx1, float by1, float bx2,
    float by2, float b_area) {
  float width = max_of(min_of(ax2, bx2) - max_of(ax1, bx1), 0.0f);
  float height = max_of(min_of(ay2, by2) - max_of(ay1, by1), 0.0f);
  float inter = mul_rn(width, height);
  return {inter, a_area + b_area - inter};
}
FCOS_HD Overlap overlap(const float* a, const float* b) {
  return overlap(a[0], a[1], a[2], a[3], area(a), b[0], b[1], b[2], b[3], area(b));
}

// Decodes the box at distances `ltrb`, in strides, from a point of a level.
FCOS_HD void decode_box(const Level& level, int64_t point, const float* ltrb, float* box) {
  float x = level.x(int(point % level.width)), y = level.y(int(point / level.width));
  box[0] = x - mul_rn(ltrb[0], level.stride);
  box[1] = y - mul_rn(ltrb[1], level.stride);
  box[2] = x + mul_rn(ltrb[2], level.stride);
  box[3] = y + mul_rn(ltrb[3], level.stride);
}

FCOS_HD void clip_box(float bottom, float right, float* box) {
  for (int c = 0; c < 4; ++c) {
    box[c] = min_of(max_of(box[c], 0.0f), c % 2 ? bottom : right);
  }
}

FCOS_HD bool is_finite(const float* box) { // x - x is NaN for infinite and NaN x
  float zero = (box[0] - box[0]) + (box[1] - box[1]) + (box[2] - box[2]) + (box[3] - box[3]);
  return zero == 0;
}

// The sizes a level is responsible for.
struct SizeRange {
  float low, high;
  bool inclusive;

  FCOS_HD bool contains(float size) const {
    return inclusive ? size >= low && size <= high : size > low && size < high;
  }
};

// 1904.01355 equation 3.
FCOS_HD float centerness(const Ltrb<float>& d) {
  float horizontal = min_of(d.left, d.right) / max_of(d.left, d.right);
  float vertical = min_of(d.top, d.bottom) / max_of(d.top, d.bottom);
  return std::sqrt(horizontal * vertical);
}

enum class LossType : int { kIou, kLinearIou, kGiou, kDiou, kCiou };
enum class QualityType : int { kCenterness, kIou };

template <class T>
struct BoxLoss {
  T loss, iou;
  Ltrb<T> slope; // d loss / d prediction
};

constexpr double kEps = 1e-7;    // keeps denominators away from zero
constexpr double kMinIou = 1e-6; // unsmoothed -log(IoU) is constant below
constexpr double kLogMinIou = -13.815510557964274;
constexpr double kPi = 3.14159265358979323846;

// max(a - b, 0)
template <class T>
FCOS_HD T beyond(T a, T b) {
  return max_of(a - b, T(0));
}

// Loss of prediction p with target t, both around the same point; see reference.iou_loss.
template <class T>
FCOS_HD BoxLoss<T> iou_loss(const Ltrb<T>& p, const Ltrb<T>& t, T smoothing, LossType type) {
  const T eps = T(kEps);
  T overlap_w = min_of(p.left, t.left) + min_of(p.right, t.right);
  T overlap_h = min_of(p.top, t.top) + min_of(p.bottom, t.bottom);
  bool overlaps = overlap_w > 0 && overlap_h > 0;
  T inter = overlaps ? overlap_w * overlap_h : T(0);
  Ltrb<T> d_inter = {
      overlaps && p.left < t.left ? overlap_h : T(0), overlaps && p.top < t.top ? overlap_w : T(0),
      overlaps && p.right < t.right ? overlap_h : T(0),
      overlaps && p.bottom < t.bottom ? overlap_w : T(0)};
  T w = p.left + p.right, h = p.top + p.bottom;
  T target_w = t.left + t.right, target_h = t.top + t.bottom;
  // The symmetric difference is computed from the extents beyond the overlap: subtracting areas
  // would cancel catastrophically for boxes that nearly coincide.
  T more_w = beyond(p.left, t.left) + beyond(p.right, t.right);
  T more_h = beyond(p.top, t.top) + beyond(p.bottom, t.bottom);
  T less_w = beyond(t.left, p.left) + beyond(t.right, p.right);
  T less_h = beyond(t.top, p.top) + beyond(t.bottom, p.bottom);
  T different = overlaps ? overlap_w * (more_h + less_h) + overlap_h * (more_w + less_w) +
                               more_w * more_h + less_w * less_h
                         : w * h + target_w * target_h;
  T union_area = inter + different;
  Ltrb<T> d_union = {h - d_inter.left, w - d_inter.top, h - d_inter.right, w - d_inter.bottom};
  T denominator = union_area + smoothing + eps;
  T iou = (inter + smoothing) / denominator;
  Ltrb<T> d_iou = {
      (d_inter.left - iou * d_union.left) / denominator,
      (d_inter.top - iou * d_union.top) / denominator,
      (d_inter.right - iou * d_union.right) / denominator,
      (d_inter.bottom - iou * d_union.bottom) / denominator};
  if (type == LossType::kIou) {
    bool flat = iou <= (smoothing == 0 ? T(kMinIou) : T(0)); // 0: only inverted boxes
    return {
        flat ? T(-kLogMinIou) : std::log1p((different + eps) / (inter + smoothing)),
        iou,
        {flat ? T(0) : -d_iou.left / iou, flat ? T(0) : -d_iou.top / iou,
         flat ? T(0) : -d_iou.right / iou, flat ? T(0) : -d_iou.bottom / iou}};
  }
  T distinct = (different + eps) / denominator; // 1 - iou
  BoxLoss<T> out = {distinct, iou, {-d_iou.left, -d_iou.top, -d_iou.right, -d_iou.bottom}};
  if (type == LossType::kLinearIou) {
    return out;
  }

  T cover_w = max_of(p.left, t.left) + max_of(p.right, t.right);
  T cover_h = max_of(p.top, t.top) + max_of(p.bottom, t.bottom);
  Ltrb<T> grows = {
      T(p.left > t.left), T(p.top > t.top), T(p.right > t.right), T(p.bottom > t.bottom)};
  if (type == LossType::kGiou) {
    T cover = cover_w * cover_h;
    Ltrb<T> d_cover = {
        grows.left * cover_h, grows.top * cover_w, grows.right * cover_h, grows.bottom * cover_w};
    T uncovered = overlaps ? more_w * less_h + less_w * more_h : cover - union_area;
    T empty = uncovered / (cover + eps);
    out.loss += empty;
    out.slope.left += (d_cover.left - d_union.left - empty * d_cover.left) / (cover + eps);
    out.slope.top += (d_cover.top - d_union.top - empty * d_cover.top) / (cover + eps);
    out.slope.right += (d_cover.right - d_union.right - empty * d_cover.right) / (cover + eps);
    out.slope.bottom += (d_cover.bottom - d_union.bottom - empty * d_cover.bottom) / (cover + eps);
    return out;
  }

  T diagonal = cover_w * cover_w + cover_h * cover_h + eps;
  T shift_x = ((p.right - t.right) - (p.left - t.left)) / 2;
  T shift_y = ((p.bottom - t.bottom) - (p.top - t.top)) / 2;
  T distance = (shift_x * shift_x + shift_y * shift_y) / diagonal;
  out.loss += distance;
  out.slope.left += (-shift_x - distance * (2 * cover_w * grows.left)) / diagonal;
  out.slope.top += (-shift_y - distance * (2 * cover_h * grows.top)) / diagonal;
  out.slope.right += (shift_x - distance * (2 * cover_w * grows.right)) / diagonal;
  out.slope.bottom += (shift_y - distance * (2 * cover_h * grows.bottom)) / diagonal;
  if (type == LossType::kDiou) {
    return out;
  }

  T angle = std::atan2(w, h) - std::atan2(target_w, target_h);
  T aspect = T(4 / (kPi * kPi)) * (angle * angle);
  T trade_off = aspect / (distinct + aspect + eps); // constant in the gradient (1911.08287)
  T factor = trade_off * (T(8 / (kPi * kPi)) * angle) / (w * w + h * h + eps);
  out.loss += trade_off * aspect;
  out.slope.left += factor * h;
  out.slope.top -= factor * w;
  out.slope.right += factor * h;
  out.slope.bottom -= factor * w;
  return out;
}

// Binary cross-entropy of a logit against a target in [0, 1], and its gradient.
template <class T>
struct QualityLoss {
  T loss, slope;
};

template <class T>
FCOS_HD QualityLoss<T> quality_loss(T logit, T target) {
  T e = std::exp(-std::abs(logit));
  T probability = (logit >= 0 ? T(1) : e) / (1 + e);
  return {max_of(logit, T(0)) - logit * target + std::log1p(e), probability - target};
}

} // namespace fcos
