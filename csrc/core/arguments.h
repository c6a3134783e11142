// Arguments of the CPU and CUDA kernels: plain numbers and pointers.
//
// B images, L levels, P points of all levels together, M boxes of the batch, K classes, N slots for
// candidates, D detections kept per image.
#pragma once

#include "geometry.h"
#include "levels.h"

namespace fcos {

enum class DType { kFloat, kHalf, kBFloat16, kDouble };

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

// Strides in elements. Point p (row-major) and channel c of image b is element
// b * image + c * channel + p * point. A dimension of size 1 has stride 0.
struct Strides {
  int64_t image, channel, point;
};

// One level of a list of maps [B, C, H, W].
struct Map {
  const void* data;
  void* grad; // null where only `data` is read
  Strides data_strides, grad_strides;
  int num_points;
  int64_t first_point; // of this level among the P points
};

struct Maps {
  int num_levels;
  Map level[kMaxLevels];
};

// `pixel_extent` is 1 if x2 and y2 are the last pixels inside a box, 0 if they are its edges.

struct AssignTargets {
  const float* boxes;     // [M, 4]
  const int64_t* classes; // [M], -1 for a region to ignore
  const int64_t* offsets; // [B + 1]
  int num_boxes;
  int64_t num_images;
  Levels levels;
  SizeRange ranges[kMaxLevels];
  float center_radius; // in strides, 0 for no center sampling
  float pixel_extent;
  int num_classes;
  int32_t* labels;   // [B, P]
  int32_t* matched;  // [B, P]
  float* ltrb;       // [B, P, 4], aligned to 16 bytes
  float* centerness; // [B, P]
  int32_t* counts;   // [B, L, 2]
  float* totals;     // [2]: number of positive points, sum of their centerness
};

// Losses and upstream gradients are float, or double if the maps are.

// Factor of a loss: weight / max(divisor, floor). Its gradient is also multiplied by `upstream`.
struct LossScale {
  double weight;
  const void* divisor; // null for 1
  double floor;
  const void* upstream; // upstream gradient; null for 1

  template <class Real>
  FCOS_HD Real of_loss() const {
    Real d = divisor == nullptr ? Real(1) : *static_cast<const Real*>(divisor);
    return Real(weight) / (divisor != nullptr && d < Real(floor) ? Real(floor) : d);
  }
  template <class Real>
  FCOS_HD Real of_upstream() const {
    return upstream == nullptr ? Real(1) : *static_cast<const Real*>(upstream);
  }
  template <class Real>
  FCOS_HD Real of_gradient() const {
    return of_loss<Real>() * of_upstream<Real>();
  }
};

template <class Real>
FCOS_HD bool all_upstream_are_one(const LossScale& a, const LossScale& b, const LossScale& c) {
  return a.of_upstream<Real>() == 1 && b.of_upstream<Real>() == 1 && c.of_upstream<Real>() == 1;
}

struct FocalLoss {
  Maps logits; // C = K
  DType dtype;
  int64_t num_images, num_points;
  int num_classes;
  const int32_t* labels; // [B, P]
  double alpha;          // negative for no weights
  double gamma;
  LossScale scale;
  void* loss;
};

struct BoxLosses {
  Maps ltrb;    // C = 4
  Maps quality; // C = 1
  DType dtype;
  int64_t num_images, num_points;
  const int32_t* matched;         // [B, P]
  const float* target_ltrb;       // [B, P, 4]
  const float* target_centerness; // [B, P]
  LossType loss_type;
  QualityType quality_type;
  bool weight_by_centerness;
  double smoothing[kMaxLevels];
  LossScale box_scale, quality_scale;
  void *box_loss, *quality_loss;
};

// All losses of a detector. Parts without levels are skipped.
struct Losses {
  FocalLoss focal;
  BoxLosses box;
  bool wants_loss, wants_gradient;
  bool is_saved; // `grad` already holds the gradient for upstream gradients of 1
};

enum class ScoreRule { kSqrt, kProduct, kCls };

struct SelectCandidates {
  Maps logits, ltrb, quality; // C = K, 4, 1
  DType logits_dtype, ltrb_dtype, quality_dtype;
  Levels levels;
  int64_t num_images;
  int num_classes;
  const int64_t* image_sizes; // [B, 2], (height, width)
  float threshold;
  int64_t topk;
  bool threshold_with_quality, rank_with_quality;
  ScoreRule score_rule;
  bool clip, drop_empty;
  float pixel_extent;
  int64_t slots[kMaxLevels + 1]; // level l owns the slots [slots[l], slots[l + 1]) of N
  float* boxes;                  // [B, N, 4]
  float* scores;                 // [B, N]
  int64_t* classes;              // [B, N], -1 for an empty slot
};

enum class NmsMethod { kHard, kLinear, kGaussian };

struct PaddedNms {
  const float* boxes;     // [B, N, 4]
  const float* scores;    // [B, N]
  const int64_t* classes; // [B, N], -1 for an empty slot
  int64_t num_images, num_boxes, max_detections;
  float iou_threshold;
  bool class_agnostic;
  NmsMethod method;
  float sigma, min_score, pixel_extent;
  float* kept_boxes;     // [B, D, 4]
  float* kept_scores;    // [B, D]
  int64_t* kept_classes; // [B, D]
  int32_t* counts;       // [B]
};

} // namespace fcos
