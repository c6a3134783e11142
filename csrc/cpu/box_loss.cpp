// box_loss: visits only the positive points.

#include <algorithm>
#include <vector>

#include "ops.h"

namespace fcos::cpu {
namespace {

constexpr int64_t kPointsPerPiece = 4096;
constexpr int64_t kGrain = 16; // minimum pieces per thread, about 0.1 ms

// Losses and gradients of one positive point.
template <class T>
struct PointTerms {
  BoxLoss<T> box; // weighted
  QualityLoss<T> quality;
};

template <class Storage>
using Compute = decltype(widen(Storage{}));

template <class Storage>
PointTerms<Compute<Storage>> terms(const BoxLosses& args, int l, int64_t image, int64_t point) {
  using T = Compute<Storage>;
  const Map& map = args.ltrb.level[l];
  auto side = [&](int c) {
    return widen(static_cast<const Storage*>(map.data)[element(map.data_strides, image, c, point)]);
  };
  int64_t row = image * args.num_points + map.first_point + point;
  const float* target = args.target_ltrb + 4 * row;
  Ltrb<T> pred = {side(0), side(1), side(2), side(3)};
  Ltrb<T> truth = {target[0], target[1], target[2], target[3]};
  BoxLoss<T> box = iou_loss(pred, truth, T(args.smoothing[l]), args.loss_type);
  T centerness = args.target_centerness[row];
  T weight = args.weight_by_centerness ? centerness : T(1);
  T wanted = args.quality_type == QualityType::kCenterness ? centerness : box.iou;
  const Map& logits = args.quality.level[l];
  T logit = widen(
      static_cast<const Storage*>(logits.data)[element(logits.data_strides, image, 0, point)]);
  box.loss *= weight;
  box.slope = {
      weight * box.slope.left, weight * box.slope.top, weight * box.slope.right,
      weight * box.slope.bottom};
  return {box, quality_loss(logit, wanted)};
}

struct Sums {
  double box = 0, quality = 0;
};

// A range of points of one level of one image.
struct Piece {
  int level;
  int64_t image, first, last;
};

std::vector<Piece> pieces(const BoxLosses& args) {
  std::vector<Piece> all;
  for (int64_t image = 0; image < args.num_images; ++image) {
    for (int l = 0; l < args.ltrb.num_levels; ++l) {
      int64_t points = args.ltrb.level[l].num_points;
      for (int64_t p = 0; p < points; p += kPointsPerPiece) {
        all.push_back({l, image, p, std::min(p + kPointsPerPiece, points)});
      }
    }
  }
  return all;
}

// Calls function(point, terms) for the positive points of a piece.
template <class Storage, class Function>
void for_each_positive(const BoxLosses& args, const Piece& piece, Function&& function) {
  const int32_t* matched =
      args.matched + piece.image * args.num_points + args.ltrb.level[piece.level].first_point;
  for (int64_t point = piece.first; point < piece.last; ++point) {
    if (matched[point] >= 0) {
      function(point, terms<Storage>(args, piece.level, piece.image, point));
    }
  }
}

template <class Storage>
void write_gradients(const BoxLosses& args, const Piece& piece) {
  using T = Compute<Storage>;
  const Map& ltrb = args.ltrb.level[piece.level];
  const Map& quality = args.quality.level[piece.level];
  auto place = [&](const Map& map, int64_t channel, int64_t point) {
    int64_t to = element(map.grad_strides, piece.image, channel, point);
    return static_cast<Storage*>(map.grad) + to;
  };
  auto put = [&](const Map& map, int64_t channel, int64_t point, T value) {
    narrow(value, place(map, channel, point));
  };
  for (int64_t point = piece.first; point < piece.last; ++point) {
    for (int64_t channel = 0; channel < 4; ++channel) {
      *place(ltrb, channel, point) = Storage{};
    }
    *place(quality, 0, point) = Storage{};
  }
  T box_scale = args.box_scale.of_gradient<T>();
  T quality_scale = args.quality_scale.of_gradient<T>();
  for_each_positive<Storage>(args, piece, [&](int64_t point, const PointTerms<T>& t) {
    put(ltrb, 0, point, box_scale * t.box.slope.left);
    put(ltrb, 1, point, box_scale * t.box.slope.top);
    put(ltrb, 2, point, box_scale * t.box.slope.right);
    put(ltrb, 3, point, box_scale * t.box.slope.bottom);
    put(quality, 0, point, quality_scale * t.quality.slope);
  });
}

} // namespace

void box_loss(const BoxLosses& args, ParallelFor parallel_for) {
  std::vector<Piece> all = pieces(args);
  std::vector<Sums> sums(all.size()); // so the order of summation is fixed
  parallel_for(int64_t(all.size()), kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      dispatch(args.dtype, [&](auto zero) {
        for_each_positive<decltype(zero)>(args, all[i], [&](int64_t, const auto& t) {
          sums[i].box += t.box.loss;
          sums[i].quality += t.quality.loss;
        });
      });
    }
  });
  Sums total;
  for (const Sums& s : sums) {
    total.box += s.box, total.quality += s.quality;
  }
  set_loss(args.dtype, total.box, args.box_scale, args.box_loss);
  set_loss(args.dtype, total.quality, args.quality_scale, args.quality_loss);
}

void box_loss_backward(const BoxLosses& args, ParallelFor parallel_for) {
  std::vector<Piece> all = pieces(args);
  parallel_for(int64_t(all.size()), kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      dispatch(args.dtype, [&](auto zero) { write_gradients<decltype(zero)>(args, all[i]); });
    }
  });
}

} // namespace fcos::cpu
