// sigmoid_focal_loss: cuts the levels into strips that lie side by side in memory.

#include <numeric>
#include <vector>

#include "focal_strip.h"
#include "ops.h"

namespace fcos::cpu {
namespace {

constexpr int64_t kPixelsPerPiece = 256;
constexpr int64_t kGrain = 32768; // logits worth a thread

struct Kernels {
  FocalForward forward;
  FocalBackward backward;
};

Kernels fastest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) {
    return {focal_forward_avx512, focal_backward_avx512};
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    return {focal_forward_avx2, focal_backward_avx2};
  }
#endif
  return {focal_forward_baseline, focal_backward_baseline};
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
    for (int l = 0; l < args.num_levels; ++l) {
      const Map& map = args.maps[l];
      bool is_pixel = map.point_stride != 1;
      int64_t total = is_pixel ? map.num_points : args.num_classes;
      int64_t step = is_pixel ? kPixelsPerPiece : 1;
      for (int64_t first = 0; first < total && map.num_points > 0; first += step) {
        all.push_back({&map, image, first, std::min(step, total - first), is_pixel});
      }
    }
  }
  return all;
}

// Calls function(strip) for every strip of a piece.
template <class Function>
void for_each_strip(const FocalLoss& args, const Piece& piece, Function&& function) {
  const Map& map = *piece.map;
  int64_t bytes = int64_t(size_of(args.dtype));
  int64_t stride = piece.is_pixel ? map.point_stride : map.channel_stride;
  int64_t image = piece.image * args.num_classes * map.num_points;
  const int32_t* labels = args.labels + piece.image * args.num_points + map.first_point;
  for (int64_t i = piece.first; i < piece.first + piece.count; ++i) {
    int64_t offset = (image + i * stride) * bytes;
    FocalStrip strip;
    strip.logits = static_cast<const char*>(map.data) + offset;
    strip.grad = map.grad ? static_cast<char*>(map.grad) + offset : nullptr;
    strip.labels = piece.is_pixel ? labels + i : labels;
    strip.size = piece.is_pixel ? args.num_classes : map.num_points;
    strip.channel = piece.is_pixel ? 0 : int32_t(i);
    strip.is_pixel = piece.is_pixel;
    function(strip);
  }
}

int64_t grain(const FocalLoss& args, size_t num_pieces) {
  int64_t logits = args.num_images * args.num_classes * args.num_points;
  return 1 + kGrain * int64_t(num_pieces) / (logits + 1);
}

} // namespace

double sigmoid_focal_loss(const FocalLoss& args, ParallelFor parallel_for) {
  FocalForward forward = fastest().forward;
  FocalOptions options{args.dtype, args.alpha, args.gamma, 0};
  std::vector<Piece> all = pieces(args);
  std::vector<double> sums(all.size(), 0.0); // one per piece, so the order of adding is fixed
  parallel_for(int64_t(all.size()), grain(args, all.size()), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      for_each_strip(args, all[i], [&](const FocalStrip& s) { sums[i] += forward(s, options); });
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

void sigmoid_focal_loss_backward(const FocalLoss& args, ParallelFor parallel_for) {
  FocalBackward backward = fastest().backward;
  FocalOptions options{args.dtype, args.alpha, args.gamma, args.grad};
  std::vector<Piece> all = pieces(args);
  parallel_for(int64_t(all.size()), grain(args, all.size()), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      for_each_strip(args, all[i], [&](const FocalStrip& s) { backward(s, options); });
    }
  });
}

} // namespace fcos::cpu
