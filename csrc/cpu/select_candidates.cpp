// select_candidates: turns the score rule into one bound on the logits per point, so that most
// logits cost one comparison; the others are scored exactly, and the best kept in a bounded buffer.

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <utility>
#include <vector>

#include "../core/ranking.h"
#include "../core/scores.h"
#include "ops.h"

// CPU and GPU must agree bit for bit, so no multiply may be fused with an add.
#pragma GCC optimize("fp-contract=off")

namespace fcos::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kRun = 32;                      // logits compared without a branch
constexpr int64_t kPointsPerBlock = 4096;     // so that their bounds stay in the cache
constexpr int64_t kLogitsPerThread = 400'000; // about 0.1 ms

// Keeps the best `k` of any number of candidates by key (ranking.h), in memory for about 2 k.
class TopK {
 public:
  explicit TopK(int64_t k = 0) : k_(size_t(k)) {}

  // No candidate with a lower rank is among the best.
  float worst() const { return worst_; }

  // Returns true if worst() may have risen.
  bool add(uint64_t key) {
    size_t limit = 2 * k_ + kSlack;
    if (keys_.size() == keys_.capacity()) {
      keys_.reserve(std::min(limit, 2 * keys_.size() + kSlack));
    }
    keys_.push_back(key);
    if (keys_.size() < limit) {
      return false;
    }
    prune();
    return true;
  }

  void add(const TopK& other) {
    keys_.insert(keys_.end(), other.keys_.begin(), other.keys_.end());
    trim();
  }

  // Frees the memory of all but the best.
  void trim() {
    if (keys_.size() > k_) {
      prune();
    }
    keys_.shrink_to_fit();
  }

  const std::vector<uint64_t>& sorted() {
    std::sort(keys_.begin(), keys_.end(), std::greater<>());
    return keys_;
  }

 private:
  static constexpr size_t kSlack = 256;

  void prune() {
    std::nth_element(keys_.begin(), keys_.begin() + int64_t(k_) - 1, keys_.end(), std::greater<>());
    keys_.resize(k_);
    worst_ = ranking_rank(keys_[k_ - 1]);
  }

  size_t k_;
  float worst_ = 0;
  std::vector<uint64_t> keys_;
};

// Writes the indices of the runs of kRun logits in which any exceeds its bound, and returns their
// number. A shorter run at the end always counts.
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
FCOS_CLONES int64_t
runs_above(const BFloat16* x, const float* bounds, int64_t size, int32_t* runs) {
  return find_runs(x, bounds, size, runs);
}
FCOS_CLONES int64_t runs_above(const Half* x, const float* bounds, int64_t size, int32_t* runs) {
  return find_runs(x, bounds, size, runs);
}

// Returns a bit mask of the logits that exceed their bounds.
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
  TopK best; // of the points done so far
  std::mutex mutex;
};

int64_t num_slots(const SelectCandidates& args, int level) {
  return args.slots[level + 1] - args.slots[level];
}

// Finds the best candidates among points of one level of one image.
class Scorer {
 public:
  Scorer(const SelectCandidates& args, const LevelOfImage& on)
      : args_(args), on_(on), best_(num_slots(args, on.level)) {}

  TopK best_of(int64_t first, int64_t last) {
    for (; first < last; first += kPointsPerBlock) {
      first_point_ = first, num_points_ = std::min(kPointsPerBlock, last - first);
      find_bounds();
      dispatch(args_.logits_dtype, [&](auto zero) { scan_block<decltype(zero)>(); });
      flush(); // before the bounds are replaced
    }
    best_.trim();
    return std::move(best_);
  }

 private:
  void find_bounds() {
    const Map& map = args_.quality.level[on_.level];
    int64_t padded = (num_points_ + kLanes - 1) / kLanes * kLanes;
    quality_.assign(padded, 0);
    bound_.resize(padded);
    dispatch(args_.quality_dtype, [&](auto zero) {
      using T = decltype(zero);
      const T* data = static_cast<const T*>(map.data);
      for (int64_t p = 0; p < num_points_; ++p) {
        quality_[p] = float(widen(data[element(map.data_strides, on_.image, 0, first_point_ + p)]));
      }
    });
    sigmoid_in_place(quality_.data(), padded);
    for (int64_t p = 0; p < num_points_; ++p) {
      bound_[p] = logit_bound(args_, quality_[p]);
    }
    raise_bounds();
  }

  // A rank is at most the class probability and, if it is the product, at most the quality.
  void raise_bounds() {
    float worst = best_.worst(), lowest = logit_below(worst);
    for (int64_t p = 0; p < num_points_; ++p) {
      bool hopeless = args_.rank_with_quality && quality_[p] < worst;
      bound_[p] = hopeless ? kInfinity : max_of(bound_[p], lowest);
    }
  }

  template <class T>
  void scan_block() {
    const Map& map = args_.logits.level[on_.level];
    const Strides& strides = map.data_strides;
    const T* data = static_cast<const T*>(map.data) + element(strides, on_.image, 0, first_point_);
    if (points_are_neighbors(map)) {
      for (int64_t c = 0; c < args_.num_classes; ++c) {
        scan(data + c * strides.channel, bound_.data(), num_points_, 0, c, false);
      }
      return;
    }
    bounds_of_classes_.resize(args_.num_classes);
    for (int64_t p = 0; p < num_points_; ++p) {
      if (bound_[p] < kInfinity) {
        std::fill(bounds_of_classes_.begin(), bounds_of_classes_.end(), bound_[p]);
        scan(data + p * strides.point, bounds_of_classes_.data(), args_.num_classes, p, 0, true);
      }
    }
  }

  // Scans logits of consecutive points of one class, or of consecutive classes of one point.
  template <class T>
  void scan(
      const T* x, const float* bounds, int64_t size, int64_t point, int64_t channel,
      bool is_pixel) {
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
        push(logits[j], quality_[p], uint32_t((first_point_ + p) * args_.num_classes + c));
      }
    }
  }

  void push(float logit, float quality, uint32_t index) {
    logit_[pending_] = logit, quality_of_[pending_] = quality, index_[pending_] = index;
    if (++pending_ == kLanes) {
      flush();
    }
  }

  void flush() {
    sigmoid_in_place(logit_, kLanes);
    bool has_risen = false;
    for (int i = 0; i < pending_; ++i) {
      float cls = logit_[i], product = cls * quality_of_[i], rank = rank_of(args_, cls, product);
      if (passes(args_, cls, product) && rank >= best_.worst()) {
        has_risen |= best_.add(ranking_key(rank, index_[i]));
      }
    }
    pending_ = 0;
    if (has_risen) {
      raise_bounds();
    }
  }

  const SelectCandidates& args_;
  const LevelOfImage& on_;
  TopK best_;
  int64_t first_point_ = 0, num_points_ = 0; // of the block
  std::vector<float> quality_;               // probability of every point of the block
  std::vector<float> bound_;                 // lower bound on its logits; rises with `best_`
  std::vector<float> bounds_of_classes_;     // of one point
  std::vector<int32_t> runs_;
  int pending_ = 0;
  float logit_[kLanes] = {}, quality_of_[kLanes] = {};
  uint32_t index_[kLanes];
};

float read(const Map& map, DType dtype, int64_t image, int64_t channel, int64_t point) {
  return dispatch(dtype, [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(map.data);
    return float(widen(data[element(map.data_strides, image, channel, point)]));
  });
}

void write_empty(const SelectCandidates& args, int64_t first, int64_t last) {
  std::fill(args.boxes + 4 * first, args.boxes + 4 * last, 0.0f);
  std::fill(args.scores + first, args.scores + last, 0.0f);
  std::fill(args.classes + first, args.classes + last, -1);
}

void write_candidate(
    const SelectCandidates& args, const LevelOfImage& on, uint32_t index, int64_t to) {
  int l = on.level;
  int64_t point = index / uint32_t(args.num_classes), channel = index % uint32_t(args.num_classes);
  float cls = sigmoid(read(args.logits.level[l], args.logits_dtype, on.image, channel, point));
  float quality = sigmoid(read(args.quality.level[l], args.quality_dtype, on.image, 0, point));
  float distances[4], *box = args.boxes + 4 * to;
  for (int side = 0; side < 4; ++side) {
    distances[side] = read(args.ltrb.level[l], args.ltrb_dtype, on.image, side, point);
  }
  if (!make_box(args, l, on.image, point, distances, box)) {
    return write_empty(args, to, to + 1);
  }
  args.scores[to] = score_of(args, cls, cls * quality);
  args.classes[to] = channel;
}

void write(const SelectCandidates& args, LevelOfImage& on) {
  int64_t to = on.image * args.slots[args.levels.count] + args.slots[on.level];
  int64_t end = to + num_slots(args, on.level);
  for (uint64_t key : on.best.sorted()) {
    write_candidate(args, on, ranking_index(key), to++);
  }
  write_empty(args, to, end);
}

} // namespace

void select_candidates(const SelectCandidates& args, ParallelFor parallel_for) {
  int64_t points_per_image = 0;
  for (int level = 0; level < args.levels.count; ++level) {
    points_per_image += args.logits.level[level].num_points;
  }
  std::vector<LevelOfImage> levels(size_t(args.num_images * args.levels.count));
  for (size_t i = 0; i < levels.size(); ++i) {
    levels[i].image = int64_t(i) / args.levels.count;
    levels[i].level = int(int64_t(i) % args.levels.count);
    levels[i].best = TopK(num_slots(args, levels[i].level));
  }
  // The points of all images and levels form one range, so that threads get equal shares.
  int64_t grain = 1 + kLogitsPerThread / (args.num_classes + 1);
  parallel_for(args.num_images * points_per_image, grain, [&](int64_t first, int64_t last) {
    int64_t begin = 0;
    for (LevelOfImage& on : levels) {
      int64_t size = args.logits.level[on.level].num_points;
      int64_t from = std::max(first - begin, int64_t(0)), to = std::min(last - begin, size);
      if (from < to) {
        TopK found = Scorer(args, on).best_of(from, to);
        std::lock_guard<std::mutex> lock(on.mutex);
        on.best.add(found);
      }
      begin += size;
    }
  });
  parallel_for(int64_t(levels.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      write(args, levels[i]);
    }
  });
}

} // namespace fcos::cpu
