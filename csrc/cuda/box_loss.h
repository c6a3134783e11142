// Box loss and quality loss: a thread per point. Nearly all points are background; their threads read
// one number and write zeros.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "numbers.h"

namespace fcos::cuda {

// A point of an image.
struct Point {
  int level;
  int64_t image, index; // among the points of its level
  int64_t target;       // among all B x P
};

// False for surplus threads.
__device__ __forceinline__ bool find_point(const BoxLosses& args, int64_t thread, Point* point) {
  point->image = thread / args.num_points;
  int64_t index = thread - point->image * args.num_points;
  point->target = thread;
  int level = args.ltrb.num_levels - 1;
  while (args.ltrb.level[level].first_point > index) {
    --level;
  }
  point->level = level;
  point->index = index - args.ltrb.level[level].first_point;
  return point->image < args.num_images;
}

// The five predictions of a point: four sides and the logit of its quality.
template <class Real>
using Predictions = Real[5];

template <class T, class Real>
__device__ void write(const BoxLosses& args, const Point& point, const Predictions<Real>& grad) {
  const Map &ltrb = args.ltrb.level[point.level], &quality = args.quality.level[point.level];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    int64_t to = offset(ltrb.grad_strides, point.image, c, point.index);
    narrow(grad[c], static_cast<T*>(ltrb.grad) + to);
  }
  int64_t to = offset(quality.grad_strides, point.image, 0, point.index);
  narrow(grad[4], static_cast<T*>(quality.grad) + to);
}

// Losses of a point, zero for background.
template <class Real>
struct PointLosses {
  Real box = 0, quality = 0;
};

// Both losses of a positive point; `x` becomes their gradient.
template <class Real>
__device__ PointLosses<Real> losses_of(
    const BoxLosses& args, const Point& point, Predictions<Real>& x) {
  const float* to = args.target_ltrb + 4 * point.target;
  Ltrb<Real> target = {Real(to[0]), Real(to[1]), Real(to[2]), Real(to[3])};
  Real centerness = Real(args.target_centerness[point.target]);
  Real weight = args.weight_by_centerness ? centerness : Real(1);
  BoxLoss<Real> box = iou_loss(
      Ltrb<Real>{x[0], x[1], x[2], x[3]}, target, Real(args.smoothing[point.level]),
      args.loss_type);
  Real wanted = args.quality_type == QualityType::kIou ? box.iou : centerness;
  QualityLoss<Real> quality = quality_loss(x[4], wanted);
  Real scale = args.box_scale.of_gradient<Real>() * weight;
  x[0] = scale * box.slope.left, x[1] = scale * box.slope.top;
  x[2] = scale * box.slope.right, x[3] = scale * box.slope.bottom;
  x[4] = args.quality_scale.of_gradient<Real>() * quality.slope;
  return {weight * box.loss, quality.loss};
}

// Losses and gradients of the point that a thread owns.
template <class Real, bool Grad>
__device__ PointLosses<Real> take_point(const BoxLosses& args, int64_t thread) {
  PointLosses<Real> losses;
  Point point;
  if (!find_point(args, thread, &point)) {
    return losses;
  }
  Predictions<Real> x = {0, 0, 0, 0, 0};
  if (args.matched[point.target] >= 0) {
    with_type(args.dtype, [&](auto zero) {
      using T = decltype(zero);
      read<T, 4>(args.ltrb.level[point.level], point.image, 0, point.index, x);
      read<T, 1>(args.quality.level[point.level], point.image, 0, point.index, x + 4);
    });
    losses = losses_of<Real>(args, point, x);
  }
  if constexpr (Grad) {
    with_type(args.dtype, [&](auto zero) { write<decltype(zero), Real>(args, point, x); });
  }
  return losses;
}

} // namespace fcos::cuda
