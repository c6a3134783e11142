// box_loss: a thread per point. Nearly all are background: they read one number and write zeros.

#include "ops.h"

#include "launch.h"
#include "numbers.h"
#include "sums.h"

namespace fcos::cuda {
namespace {

constexpr int kThreads = 256;

// A point of an image.
struct Point {
  int level;
  int64_t image, index; // among the points of its level
  int64_t target;       // among all B x P
};

// False for the threads that are left over.
__device__ bool find_point(const BoxLossArgs& args, unsigned blocks_per_image, Point* point) {
  unsigned image = blockIdx.x / blocks_per_image;
  int64_t index = int64_t(blockIdx.x - image * blocks_per_image) * kThreads + threadIdx.x;
  point->image = image;
  point->target = image * args.num_points + index;
  if (index >= args.num_points) {
    return false;
  }
  int level = args.ltrb.num_levels - 1;
  while (args.ltrb.level[level].first_point > index) {
    --level;
  }
  point->level = level;
  point->index = index - args.ltrb.level[level].first_point;
  return true;
}

__device__ int64_t offset(const Strides& strides, const Point& point, int channel) {
  return point.image * strides.image + channel * strides.channel + point.index * strides.point;
}

template <class T>
__device__ typename Compute<T>::Type read(const Map& map, const Point& point, int channel) {
  return widen(static_cast<const T*>(map.data)[offset(map.data_strides, point, channel)]);
}

template <class T>
__device__ void write(
    const Map& map, const Point& point, int channel, typename Compute<T>::Type value) {
  narrow(value, static_cast<T*>(map.grad) + offset(map.grad_strides, point, channel));
}

// Both losses of a positive point, with their gradients.
template <class Real>
struct Terms {
  Real weight; // of the box loss
  BoxLoss<Real> box;
  QualityLoss<Real> quality;
};

template <class T>
__device__ Terms<typename Compute<T>::Type> terms_of(const BoxLossArgs& args, const Point& point) {
  using Real = typename Compute<T>::Type;
  const Map& map = args.ltrb.level[point.level];
  Ltrb<Real> predicted = {
      read<T>(map, point, 0), read<T>(map, point, 1), read<T>(map, point, 2),
      read<T>(map, point, 3)};
  const float* to = args.target_ltrb + 4 * point.target;
  Ltrb<Real> target = {Real(to[0]), Real(to[1]), Real(to[2]), Real(to[3])};
  Real centerness = Real(args.target_centerness[point.target]);
  Terms<Real> terms;
  terms.weight = args.weight_by_centerness ? centerness : Real(1);
  terms.box = iou_loss(predicted, target, Real(args.smoothing[point.level]), args.loss_type);
  Real quality = args.quality_type == QualityType::kIou ? terms.box.iou : centerness;
  terms.quality = quality_loss(read<T>(args.quality.level[point.level], point, 0), quality);
  return terms;
}

template <class T>
__global__ void __launch_bounds__(kThreads) loss_kernel(
    const __grid_constant__ BoxLossArgs args, double* partials, unsigned blocks_per_image) {
  __shared__ double box_of_warps[kThreads / 32], quality_of_warps[kThreads / 32];
  double box = 0, quality = 0;
  Point point;
  if (find_point(args, blocks_per_image, &point) && args.matched[point.target] >= 0) {
    auto terms = terms_of<T>(args, point);
    box = double(terms.weight * terms.box.loss);
    quality = double(terms.quality.loss);
  }
  box = block_sum(box, box_of_warps);
  quality = block_sum(quality, quality_of_warps);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = box;
    partials[gridDim.x + blockIdx.x] = quality;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    grad_kernel(const __grid_constant__ BoxLossArgs args, unsigned blocks_per_image) {
  using Real = typename Compute<T>::Type;
  Point point;
  if (!find_point(args, blocks_per_image, &point)) {
    return;
  }
  Ltrb<Real> box = {0, 0, 0, 0};
  Real quality = 0;
  if (args.matched[point.target] >= 0) {
    Terms<Real> terms = terms_of<T>(args, point);
    Real scale = *static_cast<const Real*>(args.grad_box) * terms.weight;
    const Ltrb<Real>& slope = terms.box.slope;
    box = {scale * slope.left, scale * slope.top, scale * slope.right, scale * slope.bottom};
    quality = *static_cast<const Real*>(args.grad_quality) * terms.quality.slope;
  }
  const Map& map = args.ltrb.level[point.level];
  write<T>(map, point, 0, box.left);
  write<T>(map, point, 1, box.top);
  write<T>(map, point, 2, box.right);
  write<T>(map, point, 3, box.bottom);
  write<T>(args.quality.level[point.level], point, 0, quality);
}

int64_t blocks_per_image(const BoxLossArgs& args) { return divide_up(args.num_points, kThreads); }

} // namespace

int64_t box_loss_partials(const BoxLossArgs& args) {
  return args.num_images * blocks_per_image(args);
}

cudaError_t launch_box_loss(const BoxLossArgs& args, double* partials, cudaStream_t stream) {
  int64_t blocks = box_loss_partials(args);
  if (blocks > kMaxBlocks) {
    return cudaErrorInvalidConfiguration;
  }
  cudaError_t error = cudaSuccess;
  if (blocks > 0) {
    with_type(args.dtype, [&](auto zero) {
      loss_kernel<decltype(zero)><<<unsigned(blocks), kThreads, 0, stream>>>(
          args, partials, unsigned(blocks_per_image(args)));
    });
    error = cudaGetLastError();
  }
  Sums sums = {partials, blocks, {args.box_loss, args.quality_loss}, args.dtype == DType::kDouble};
  return error == cudaSuccess ? launch_sums(sums, 2, stream) : error;
}

cudaError_t launch_box_loss_backward(const BoxLossArgs& args, cudaStream_t stream) {
  int64_t blocks = box_loss_partials(args);
  if (blocks > kMaxBlocks) {
    return cudaErrorInvalidConfiguration;
  }
  if (blocks == 0) {
    return cudaSuccess;
  }
  with_type(args.dtype, [&](auto zero) {
    grad_kernel<decltype(zero)>
        <<<unsigned(blocks), kThreads, 0, stream>>>(args, unsigned(blocks_per_image(args)));
  });
  return cudaGetLastError();
}

} // namespace fcos::cuda
