// select_candidates: the score rule becomes one bound on the logit per point, so that almost every
// logit costs one comparison; survivors are scored exactly and the best kept in a bounded buffer.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../core/ranking.h"
#include "../core/scores.h"
#include "ops.h"

// CPU and GPU must agree to the bit: no product may be fused into a sum.
#pragma GCC optimize("fp-contract=off")

namespace fcos::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
  uint64_t key; // of rank and of index = point * K + class
  float score;
};

// The best `k` of any number of candidates, in memory for 2 k.
class Best {
 public:
  explicit Best(int64_t k) : k_(size_t(k)) {}

  bool wants(float rank) const { return rank >= worst_; }

  void add(float rank, uint32_t index, float score) {
    found_.push_back({ranking_key(rank, index), score});
    if (found_.size() >= 2 * k_ + kSlack) {
      shrink();
    }
  }

  const std::vector<Candidate>& sorted() {
    if (found_.size() > k_) {
      shrink();
    }
    std::sort(found_.begin(), found_.end(), better);
    return found_;
  }

 private:
  static constexpr size_t kSlack = 256;
  static bool better(const Candidate& a, const Candidate& b) { return a.key > b.key; }

  void shrink() {
    std::nth_element(found_.begin(), found_.begin() + int64_t(k_) - 1, found_.end(), better);
    found_.resize(k_);
    uint32_t bits = uint32_t(found_[k_ - 1].key >> 32);
    std::memcpy(&worst_, &bits, sizeof bits);
  }

  size_t k_;
  float worst_ = 0;
  std::vector<Candidate> found_;
};

// One level of one image: probabilities of quality, and the bound every logit must exceed.
struct LevelScan {
  const SelectCandidates& args;
  int level;
  int64_t image;
  std::vector<float> quality, bound;

  LevelScan(const SelectCandidates& a, int l, int64_t i) : args(a), level(l), image(i) {
    const Map& map = args.quality.level[level];
    int64_t padded = (map.num_points + kLanes - 1) / kLanes * kLanes;
    quality.assign(padded, 0);
    bound.assign(padded, kInfinity);
    dispatch(args.quality_dtype, [&](auto zero) {
      using T = decltype(zero);
      const T* data = static_cast<const T*>(map.data);
      for (int64_t p = 0; p < map.num_points; ++p) {
        quality[p] = float(widen(data[element(map.data_layout, image, 0, p)]));
      }
    });
    for (int64_t p = 0; p < padded; p += kLanes) {
      Floats x;
      std::memcpy(&x, &quality[p], sizeof x);
      x = sigmoid<Floats, Bits>(x);
      std::memcpy(&quality[p], &x, sizeof x);
    }
    set_bounds(map.num_points);
  }

  void set_bounds(int64_t num_points) {
    for (int64_t p = 0; p < num_points; ++p) {
      bound[p] = logit_bound(args, quality[p]);
    }
  }

  // Scores kLanes logits of points [point, point + kLanes) of one class, or of classes
  // [channel, channel + kLanes) of one point.
  void score(Floats x, Floats q, int count, int64_t point, int64_t channel, bool planes, Best* best) {
    Floats cls = sigmoid<Floats, Bits>(x);
    Floats both = cls * q;
    for (int i = 0; i < count; ++i) {
      float rank = rank_of(args, cls[i], both[i]);
      if (passes(args, cls[i], both[i]) && best->wants(rank)) {
        int64_t p = planes ? point + i : point, k = planes ? channel : channel + i;
        uint32_t index = uint32_t(p * args.num_classes + k);
        best->add(rank, index, score_of(args, cls[i], both[i]));
      }
    }
  }

  template <class T>
  void scan(const T* data, int64_t size, const float* q, const float* bounds, int step, int64_t point,
            int64_t channel, bool planes, Best* best) {
    for (int64_t first = 0; first < size; first += kLanes) {
      int count = int(std::min<int64_t>(kLanes, size - first));
      Floats x = Floats{} - kInfinity;
      if constexpr (sizeof(T) == 4) {
        std::memcpy(&x, data + first, sizeof(float) * count);
      } else {
        for (int i = 0; i < count; ++i) {
          x[i] = float(widen(data[first + i]));
        }
      }
      Floats limit, quality_here;
      std::memcpy(&limit, bounds + first * step, sizeof limit);
      if (!step) {
        limit = Floats{} + bounds[0];
      }
      Ints above = x > limit;
      int any = 0;
      for (int i = 0; i < kLanes; ++i) {
        any |= above[i];
      }
      if (!any) {
        continue;
      }
      std::memcpy(&quality_here, q + first * step, sizeof quality_here);
      if (!step) {
        quality_here = Floats{} + q[0];
      }
      score(x, quality_here, count, planes ? point + first : point,
            planes ? channel : channel + first, planes, best);
    }
  }

  void run(Best* best) {
    const Map& map = args.logits.level[level];
    dispatch(args.logits_dtype, [&](auto zero) {
      using T = decltype(zero);
      const T* data = static_cast<const T*>(map.data) + image * map.data_layout.image;
      if (points_are_neighbours(map)) {
        for (int k = 0; k < args.num_classes; ++k) {
          scan(data + k * map.data_layout.channel, map.num_points, quality.data(), bound.data(), 1, 0, k,
               true, best);
        }
      } else {
        std::vector<float> one_quality(kLanes), one_bound(kLanes);
        for (int64_t p = 0; p < map.num_points; ++p) {
          one_quality[0] = quality[p], one_bound[0] = bound[p];
          scan(data + p * map.data_layout.point, args.num_classes, one_quality.data(), one_bound.data(), 0,
               p, 0, false, best);
        }
      }
    });
  }
};

void decode(const SelectCandidates& args, int l, int64_t image, uint32_t index, float* box) {
  const Map& map = args.ltrb.level[l];
  const Level& level = args.levels.level[l];
  int64_t point = index / uint32_t(args.num_classes);
  float distances[4];
  dispatch(args.ltrb_dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(map.data);
    for (int c = 0; c < 4; ++c) {
      distances[c] = float(widen(data[element(map.data_layout, image, c, point)]));
    }
  });
  decode_box(level, point, distances, box);
  if (args.clip) {
    clip_box(float(args.image_sizes[2 * image]), float(args.image_sizes[2 * image + 1]), box);
  }
}

void select_level(const SelectCandidates& args, int level, int64_t image) {
  int64_t first = args.slots[level], last = args.slots[level + 1];
  int64_t base = image * args.slots[args.levels.count];
  if (first == last) {
    return;
  }
  Best best(last - first);
  LevelScan(args, level, image).run(&best);
  const std::vector<Candidate>& found = best.sorted();
  for (int64_t slot = first; slot < last; ++slot) {
    int64_t out = base + slot, i = slot - first;
    bool filled = i < int64_t(found.size());
    float* box = args.boxes + 4 * out;
    if (filled) {
      uint32_t index = ranking_index(found[i].key);
      decode(args, level, image, index, box);
      args.scores[out] = found[i].score;
      args.classes[out] = index % uint32_t(args.num_classes);
    } else {
      box[0] = box[1] = box[2] = box[3] = 0;
      args.scores[out] = 0;
      args.classes[out] = -1;
    }
  }
}

} // namespace

void select_candidates(const SelectCandidates& args, ParallelFor parallel_for) {
  int64_t levels = args.levels.count;
  parallel_for(args.num_images * levels, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      select_level(args, int(item % levels), item / levels);
    }
  });
}

} // namespace fcos::cpu
