// The CPU kernels: plain pointers in, plain pointers out. No torch.
//
// B images, L levels, P points of all levels together, M boxes of the batch, K classes.
// Every kernel splits its work into pieces that do not depend on the number of threads and adds
// their partial sums in a fixed order, so results are bitwise the same on any number of threads.
#pragma once

#include <functional>
#include <vector>

#include "../core/geometry.h"
#include "../core/levels.h"
#include "numbers.h"

namespace fcos::cpu {

// Calls task(first, last) on disjoint ranges that cover [0, count), in parallel where `grain` items
// are worth a thread.
using Task = std::function<void(int64_t first, int64_t last)>;
using ParallelFor = void (*)(int64_t count, int64_t grain, const Task& task);

struct AssignTargets {
  const float* boxes;     // [M, 4]
  const int64_t* classes; // [M], -1 for a region to ignore
  const int64_t* offsets; // [B + 1]
  int64_t num_images;
  Levels levels;
  SizeRange ranges[kMaxLevels];
  float center_radius; // in strides, 0 for none
  int num_classes;
  int32_t* labels;   // [B, P]
  int32_t* matched;  // [B, P]
  float* ltrb;       // [B, P, 4]
  float* centerness; // [B, P]
  int32_t* counts;   // [B, L, 2]
};
void assign_targets(const AssignTargets& args, ParallelFor parallel_for);

// One level of a list of maps [B, C, H, W]. Point p, channel c of image b is element
// b * C * points + c * channel_stride + p * point_stride.
struct Map {
  const void* data;
  void* grad; // same layout; null in a forward pass
  int64_t num_points, first_point;
  int64_t channel_stride, point_stride;
};

struct FocalLoss {
  Map maps[kMaxLevels];
  int num_levels;
  DType dtype;
  int64_t num_images, num_points;
  int num_classes;
  const int32_t* labels; // [B, P]
  double alpha, gamma;
  double grad; // of the loss; backward only
};
double sigmoid_focal_loss(const FocalLoss& args, ParallelFor parallel_for);
void sigmoid_focal_loss_backward(const FocalLoss& args, ParallelFor parallel_for);

struct BoxLossArgs {
  Map ltrb[kMaxLevels], quality[kMaxLevels];
  int num_levels;
  DType dtype;
  int64_t num_images, num_points;
  const int32_t* matched;         // [B, P]
  const float* target_ltrb;       // [B, P, 4]
  const float* target_centerness; // [B, P]
  LossType loss_type;
  QualityType quality_type;
  bool weight_by_centerness;
  double smoothing[kMaxLevels];
  double grad_box, grad_quality; // backward only
};
struct BoxLossSums {
  double box, quality;
};
BoxLossSums box_loss(const BoxLossArgs& args, ParallelFor parallel_for);
void box_loss_backward(const BoxLossArgs& args, ParallelFor parallel_for);

enum class ScoreRule { kSqrt, kProduct, kCls };

struct SelectCandidates {
  Map logits[kMaxLevels], ltrb[kMaxLevels], quality[kMaxLevels];
  DType logits_dtype, ltrb_dtype, quality_dtype;
  Levels levels;
  int64_t num_images;
  int num_classes;
  const int64_t* image_sizes; // [B, 2], (height, width)
  float threshold;
  int64_t topk;
  bool threshold_with_quality, rank_with_quality;
  ScoreRule score_rule;
  bool clip;
  int64_t slots[kMaxLevels + 1]; // level l owns the slots [slots[l], slots[l + 1]) of N
  float* boxes;                  // [B, N, 4]
  float* scores;                 // [B, N]
  int64_t* classes;              // [B, N], -1 for an empty slot
};
void select_candidates(const SelectCandidates& args, ParallelFor parallel_for);

enum class NmsMethod { kHard, kLinear, kGaussian };

struct PaddedNms {
  const float* boxes;     // [B, N, 4]
  const float* scores;    // [B, N]
  const int64_t* classes; // [B, N], -1 for an empty slot
  int64_t num_images, num_boxes, max_detections;
  float iou_threshold;
  bool class_agnostic;
  NmsMethod method;
  float sigma, min_score;
  float* kept_boxes;     // [B, D, 4]
  float* kept_scores;    // [B, D]
  int64_t* kept_classes; // [B, D]
  int32_t* counts;       // [B]
};
void batched_nms_padded(const PaddedNms& args, ParallelFor parallel_for);

// Indices kept of N boxes [N, 4], by descending score.
std::vector<int64_t> batched_nms(
    const float* boxes, const double* scores, const int64_t* groups, int64_t num_boxes,
    float iou_threshold);

} // namespace fcos::cpu
