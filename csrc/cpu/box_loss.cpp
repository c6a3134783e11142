// box_loss: visits the positive points only.

#include <numeric>
#include <vector>

#include "ops.h"

namespace fcos::cpu {
namespace {

constexpr int64_t kPointsPerPiece = 4096;

// What the formulas give for one positive point.
template <class T>
struct PointTerms {
  BoxLoss<T> box; // weighted
  QualityLoss<T> quality;
};

// Element of channel c of a point in a map of `channels` channels.
int64_t element(const Map& map, int64_t channels, int64_t image, int64_t c, int64_t point) {
  return image * channels * map.num_points + c * map.channel_stride + point * map.point_stride;
}

template <class Storage>
using Compute = decltype(widen(Storage{}));

template <class Storage>
PointTerms<Compute<Storage>> terms(const BoxLossArgs& args, int l, int64_t image, int64_t point) {
  using T = Compute<Storage>;
  const Map& map = args.ltrb[l];
  auto side = [&](int c) {
    return widen(static_cast<const Storage*>(map.data)[element(map, 4, image, c, point)]);
  };
  int64_t row = image * args.num_points + map.first_point + point;
  const float* target = args.target_ltrb + 4 * row;
  Ltrb<T> pred = {side(0), side(1), side(2), side(3)};
  Ltrb<T> truth = {target[0], target[1], target[2], target[3]};
  BoxLoss<T> box = iou_loss(pred, truth, T(args.smoothing[l]), args.loss_type);
  T centerness = args.target_centerness[row];
  T weight = args.weight_by_centerness ? centerness : T(1);
  T wanted = args.quality_type == QualityType::kCenterness ? centerness : box.iou;
  const Map& logits = args.quality[l];
  T logit = widen(static_cast<const Storage*>(logits.data)[element(logits, 1, image, 0, point)]);
  box.loss *= weight;
  box.slope = {weight * box.slope.left, weight * box.slope.top, weight * box.slope.right,
               weight * box.slope.bottom};
  return {box, quality_loss(logit, wanted)};
}

// A run of points of one level of one image.
struct Piece {
  int level;
  int64_t image, first, last;
};

std::vector<Piece> pieces(const BoxLossArgs& args) {
  std::vector<Piece> all;
  for (int64_t image = 0; image < args.num_images; ++image) {
    for (int l = 0; l < args.num_levels; ++l) {
      for (int64_t p = 0; p < args.ltrb[l].num_points; p += kPointsPerPiece) {
        all.push_back({l, image, p, std::min(p + kPointsPerPiece, args.ltrb[l].num_points)});
      }
    }
  }
  return all;
}

// Calls function(point, terms) for the positive points of a piece.
template <class Storage, class Function>
void for_each_positive(const BoxLossArgs& args, const Piece& piece, Function&& function) {
  const int32_t* matched =
      args.matched + piece.image * args.num_points + args.ltrb[piece.level].first_point;
  for (int64_t point = piece.first; point < piece.last; ++point) {
    if (matched[point] >= 0) {
      function(point, terms<Storage>(args, piece.level, piece.image, point));
    }
  }
}

template <class Storage>
void write_gradients(const BoxLossArgs& args, const Piece& piece) {
  using T = Compute<Storage>;
  const Map &ltrb = args.ltrb[piece.level], &quality = args.quality[piece.level];
  auto put = [&](const Map& map, int64_t channels, int64_t c, int64_t point, T value) {
    narrow(value, static_cast<Storage*>(map.grad) + element(map, channels, piece.image, c, point));
  };
  T box_scale = T(args.grad_box), quality_scale = T(args.grad_quality);
  for_each_positive<Storage>(args, piece, [&](int64_t point, const PointTerms<T>& t) {
    put(ltrb, 4, 0, point, box_scale * t.box.slope.left);
    put(ltrb, 4, 1, point, box_scale * t.box.slope.top);
    put(ltrb, 4, 2, point, box_scale * t.box.slope.right);
    put(ltrb, 4, 3, point, box_scale * t.box.slope.bottom);
    put(quality, 1, 0, point, quality_scale * t.quality.slope);
  });
}

} // namespace

BoxLossSums box_loss(const BoxLossArgs& args, ParallelFor parallel_for) {
  std::vector<Piece> all = pieces(args);
  std::vector<BoxLossSums> sums(all.size(), {0, 0}); // so the order of adding is fixed
  parallel_for(int64_t(all.size()), 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      dispatch(args.dtype, [&](auto zero) {
        for_each_positive<decltype(zero)>(args, all[i], [&](int64_t, const auto& t) {
          sums[i].box += t.box.loss;
          sums[i].quality += t.quality.loss;
        });
      });
    }
  });
  return std::accumulate(
      sums.begin(), sums.end(), BoxLossSums{0, 0}, [](BoxLossSums a, const BoxLossSums& b) {
        return BoxLossSums{a.box + b.box, a.quality + b.quality};
      });
}

void box_loss_backward(const BoxLossArgs& args, ParallelFor parallel_for) {
  std::vector<Piece> all = pieces(args);
  parallel_for(int64_t(all.size()), 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      dispatch(args.dtype, [&](auto zero) { write_gradients<decltype(zero)>(args, all[i]); });
    }
  });
}

} // namespace fcos::cpu
