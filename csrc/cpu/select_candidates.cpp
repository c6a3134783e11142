// select_candidates: the score rule becomes one bound on the logit per point, so that almost every
// logit costs one comparison; survivors are scored exactly and the best kept in a bounded buffer.

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../core/ranking.h"
#include "../core/scores.h"
#include "ops.h"

// CPU and GPU must agree to the bit: no product may be fused into a sum.
#pragma GCC optimize("fp-contract=off")

namespace fcos::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kRun = 32;                      // logits looked at without a branch
constexpr int64_t kLogitsPerPiece = 400'000; // about 0.1 ms

struct Candidate {
  uint64_t key; // of rank and of index = point * K + class
  float score;
};

// The best `k` of any number of candidates, in memory for 2 k.
class Best {
 public:
  explicit Best(int64_t k) : k_(size_t(k)) {}

  // No candidate of a lower rank is among the best.
  float worst() const { return worst_; }

  // True where `worst` has become higher.
  bool add(float rank, uint32_t index, float score) {
    found_.push_back({ranking_key(rank, index), score});
    if (found_.size() < 2 * k_ + kSlack) {
      return false;
    }
    shrink();
    return true;
  }

  void add(const Best& other) { found_.insert(found_.end(), other.found_.begin(), other.found_.end()); }

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

// Writes the runs of kRun logits, by number, in which one exceeds its bound; returns how many they
// are. What is left at the end, shorter than a run, counts as one of them.
template <class T>
FCOS_HD int64_t find_runs(const T* x, const float* bounds, int64_t size, int32_t* runs) {
  int64_t count = 0, whole = size / kRun;
  for (int64_t run = 0; run < whole; ++run) {
    int any = 0;
    for (int64_t i = run * kRun; i < (run + 1) * kRun; ++i) {
      any |= float(widen(x[i])) > bounds[i];
    }
    runs[count] = int32_t(run);
    count += any != 0;
  }
  runs[count] = int32_t(whole);
  return count + (size > whole * kRun);
}
FCOS_CLONES int64_t runs_above(const float* x, const float* bounds, int64_t size, int32_t* runs) {
  return find_runs(x, bounds, size, runs);
}
FCOS_CLONES int64_t runs_above(const double* x, const float* bounds, int64_t size, int32_t* runs) {
  return find_runs(x, bounds, size, runs);
}
FCOS_CLONES int64_t runs_above(const BFloat16* x, const float* bounds, int64_t size, int32_t* runs) {
  return find_runs(x, bounds, size, runs);
}
FCOS_CLONES int64_t runs_above(const Half* x, const float* bounds, int64_t size, int32_t* runs) {
  return find_runs(x, bounds, size, runs);
}

// A bit for each of the logits that exceed their bounds.
uint32_t exceeding(const float* logits, const float* bounds, int count) {
  uint32_t bits = 0;
  int i = 0;
#if defined(__SSE2__)
  for (; i + 4 <= count; i += 4) {
    __m128 above = _mm_cmpgt_ps(_mm_loadu_ps(logits + i), _mm_loadu_ps(bounds + i));
    bits |= uint32_t(_mm_movemask_ps(above)) << i;
  }
#endif
  for (; i < count; ++i) {
    bits |= uint32_t(logits[i] > bounds[i]) << i;
  }
  return bits;
}

// Logits -> probabilities; `size` is a multiple of kLanes.
FCOS_CLONES void sigmoid_in_place(float* x, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    Floats lanes;
    std::memcpy(&lanes, x + i, sizeof lanes);
    lanes = sigmoid<Floats, Bits>(lanes);
    std::memcpy(x + i, &lanes, sizeof lanes);
  }
}

// One level of one image.
struct LevelOfImage {
  int64_t image;
  int level;
  std::vector<float> quality; // probability
  std::vector<float> bound;   // that a logit must exceed

  void find_bounds(const SelectCandidates& args) {
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
    sigmoid_in_place(quality.data(), padded);
    for (int64_t p = 0; p < map.num_points; ++p) {
      bound[p] = logit_bound(args, quality[p]);
    }
  }
};

// Scores logits, kLanes at a time, and keeps the best.
class Scorer {
 public:
  Scorer(const SelectCandidates& args, const LevelOfImage& on, int64_t k)
      : best(k), bound(on.bound), args_(args), on_(on) {}

  // Logits of consecutive points of one class, or (bounds alike) of consecutive classes of one point.
  template <class T>
  void take(const T* x, const float* bounds, int64_t size, int64_t point, int64_t channel, bool is_pixel) {
    runs_.resize(size / kRun + 1);
    int64_t num_runs = runs_above(x, bounds, size, runs_.data());
    for (int64_t r = 0; r < num_runs; ++r) {
      int64_t first = int64_t(runs_[r]) * kRun, last = std::min(first + kRun, size);
      float logits[kRun];
      std::transform(x + first, x + last, logits, [](T logit) { return float(widen(logit)); });
      uint32_t above = exceeding(logits, bounds + first, int(last - first));
      for (; above != 0; above &= above - 1) {
        int j = __builtin_ctz(above);
        int64_t p = is_pixel ? point : point + first + j;
        int64_t c = is_pixel ? channel + first + j : channel;
        push(logits[j], on_.quality[p], uint32_t(p * args_.num_classes + c));
      }
    }
  }

  void flush() {
    sigmoid_in_place(logit_, kLanes);
    bool is_full = false;
    for (int i = 0; i < pending_; ++i) {
      float cls = logit_[i], both = cls * quality_[i], rank = rank_of(args_, cls, both);
      if (passes(args_, cls, both) && rank >= best.worst()) {
        is_full |= best.add(rank, index_[i], score_of(args_, cls, both));
      }
    }
    pending_ = 0;
    if (is_full) {
      raise_bounds();
    }
  }

  Best best;
  std::vector<float> bound; // rises as better candidates are found

 private:
  void push(float logit, float quality, uint32_t index) {
    logit_[pending_] = logit, quality_[pending_] = quality, index_[pending_] = index;
    if (++pending_ == kLanes) {
      flush();
    }
  }

  // No class probability exceeds 1, and no rank the class probability.
  void raise_bounds() {
    float worst = best.worst(), lowest = logit_below(worst);
    for (size_t p = 0; p < bound.size(); ++p) {
      bool hopeless = args_.rank_with_quality && on_.quality[p] < worst;
      bound[p] = hopeless ? kInfinity : max_of(bound[p], lowest);
    }
  }

  const SelectCandidates& args_;
  const LevelOfImage& on_;
  std::vector<int32_t> runs_;
  int pending_ = 0;
  float logit_[kLanes] = {}, quality_[kLanes] = {};
  uint32_t index_[kLanes];
};

// A piece of work: some channel planes of a level of an image, or some of its pixels.
struct Piece {
  const LevelOfImage* on;
  int64_t first, last;
};

std::vector<Piece> pieces(const SelectCandidates& args, const std::vector<LevelOfImage>& levels) {
  std::vector<Piece> all;
  for (const LevelOfImage& on : levels) {
    const Map& map = args.logits.level[on.level];
    int64_t total = points_are_neighbours(map) ? args.num_classes : map.num_points;
    int64_t logits = int64_t(map.num_points) * args.num_classes;
    int64_t step = std::max<int64_t>(1, total * kLogitsPerPiece / std::max<int64_t>(1, logits));
    for (int64_t first = 0; first < total && logits > 0; first += step) {
      all.push_back({&on, first, std::min(first + step, total)});
    }
  }
  return all;
}

Best best_of(const SelectCandidates& args, const Piece& piece) {
  const LevelOfImage& on = *piece.on;
  const Map& map = args.logits.level[on.level];
  Scorer scorer(args, on, args.slots[on.level + 1] - args.slots[on.level]);
  dispatch(args.logits_dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(map.data) + on.image * map.data_layout.image;
    if (points_are_neighbours(map)) {
      for (int64_t c = piece.first; c < piece.last; ++c) {
        const T* plane = data + c * map.data_layout.channel;
        scorer.take(plane, scorer.bound.data(), map.num_points, 0, c, false);
      }
      return;
    }
    std::vector<float> bounds(args.num_classes);
    for (int64_t p = piece.first; p < piece.last; ++p) {
      if (scorer.bound[p] < kInfinity) {
        std::fill(bounds.begin(), bounds.end(), scorer.bound[p]);
        scorer.take(
            data + p * map.data_layout.point, bounds.data(), args.num_classes, p, 0, true);
      }
    }
  });
  scorer.flush();
  return std::move(scorer.best);
}

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

void write(const SelectCandidates& args, const LevelOfImage& on, Best* best) {
  int64_t first = args.slots[on.level], last = args.slots[on.level + 1];
  const std::vector<Candidate>& found = best->sorted();
  for (int64_t slot = first; slot < last; ++slot) {
    int64_t out = on.image * args.slots[args.levels.count] + slot, i = slot - first;
    float* box = args.boxes + 4 * out;
    if (i < int64_t(found.size())) {
      uint32_t index = ranking_index(found[i].key);
      decode(args, on.level, on.image, index, box);
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
  std::vector<LevelOfImage> levels;
  for (int64_t image = 0; image < args.num_images; ++image) {
    for (int level = 0; level < args.levels.count; ++level) {
      levels.push_back({image, level, {}, {}});
    }
  }
  auto for_each = [&](size_t count, auto&& function) {
    parallel_for(int64_t(count), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        function(i);
      }
    });
  };
  for_each(levels.size(), [&](int64_t i) { levels[i].find_bounds(args); });
  std::vector<Piece> all = pieces(args, levels);
  std::vector<Best> best(all.size(), Best(0));
  for_each(all.size(), [&](int64_t i) { best[i] = best_of(args, all[i]); });
  for_each(levels.size(), [&](int64_t i) {
    Best together(args.slots[levels[i].level + 1] - args.slots[levels[i].level]);
    for (size_t piece = 0; piece < all.size(); ++piece) {
      if (all[piece].on == &levels[i]) {
        together.add(best[piece]);
      }
    }
    write(args, levels[i], &together);
  });
}

} // namespace fcos::cpu
