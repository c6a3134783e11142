// sigmoid_focal_loss: splits the levels into contiguous strips.

#include <numeric>
#include <vector>

#include "focal_strip.h"
#include "ops.h"

namespace fcos::cpu {
namespace {

constexpr int64_t kPixelsPerPiece = 256;
constexpr int64_t kGrain = 131072; // minimum logits per thread, about 0.1 ms

FocalStripKernel fastest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) {
    return focal_strip_avx512;
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    return focal_strip_avx2;
  }
#endif
  return focal_strip_baseline;
}

size_t size_of(DType dtype) {
  return dispatch(dtype, [](auto zero) { return sizeof zero; });
}

// A piece of work: one channel plane of a map, or some pixels of a channels_last map.
struct Piece {
  const Map* map;
  int64_t image, first, count; // of channels, or of pixels
  bool is_pixel;
};

std::vector<Piece> pieces(const FocalLoss& args) {
  std::vector<Piece> all;
  for (int64_t image = 0; image < args.num_images; ++image) {
    for (int l = 0; l < args.logits.num_levels; ++l) {
      const Map& map = args.logits.level[l];
      bool is_pixel = !points_are_neighbors(map);
      int64_t total = is_pixel ? map.num_points : args.num_classes;
      int64_t step = is_pixel ? kPixelsPerPiece : 1;
      for (int64_t first = 0; first < total && map.num_points > 0; first += step) {
        all.push_back({&map, image, first, std::min(step, total - first), is_pixel});
      }
    }
  }
  return all;
}

FocalStrip strip_of(const FocalLoss& args, const Piece& piece, int64_t i) {
  const Map& map = *piece.map;
  int64_t channel = piece.is_pixel ? 0 : i, point = piece.is_pixel ? i : 0;
  auto offset = [&](const Strides& strides) {
    return element(strides, piece.image, channel, point) * int64_t(size_of(args.dtype));
  };
  FocalStrip strip;
  strip.logits = static_cast<const char*>(map.data) + offset(map.data_strides);
  strip.grad = map.grad ? static_cast<char*>(map.grad) + offset(map.grad_strides) : nullptr;
  strip.labels = args.labels + piece.image * args.num_points + map.first_point + point;
  strip.size = piece.is_pixel ? args.num_classes : map.num_points;
  strip.channel = int32_t(channel);
  strip.is_pixel = piece.is_pixel;
  return strip;
}

int64_t grain(const FocalLoss& args, size_t num_pieces) {
  int64_t logits = args.num_images * args.num_classes * args.num_points;
  return 1 + kGrain * int64_t(num_pieces) / (logits + 1);
}

} // namespace

void sigmoid_focal_loss(const FocalLoss& args, ParallelFor parallel_for) {
  double scale = gradient_scale(args.dtype, args.scale);
  FocalOptions options{args.dtype, args.alpha, args.gamma, scale, args.loss != nullptr};
  FocalStripKernel kernel = fastest();
  std::vector<Piece> all = pieces(args);
  std::vector<double> sums(all.size(), 0.0); // one per piece, so the order of summation is fixed
  parallel_for(int64_t(all.size()), grain(args, all.size()), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Piece& piece = all[i];
      for (int64_t j = piece.first; j < piece.first + piece.count; ++j) {
        sums[i] += kernel(strip_of(args, piece, j), options);
      }
    }
  });
  if (args.loss) {
    double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
    set_loss(args.dtype, sum, args.scale, args.loss);
  }
}

} // namespace fcos::cpu
