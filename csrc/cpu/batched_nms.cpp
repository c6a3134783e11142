// batched_nms: compares every box only with the kept boxes of its own class, without N x N memory.

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "../core/ranking.h"
#include "ops.h"

// CPU and GPU must agree bit for bit, so no multiply may be fused with an add.
#pragma GCC optimize("fp-contract=off")

namespace fcos::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kGrain = 4096; // minimum boxes per thread, at least 0.1 ms
constexpr int kBlock = 8;        // boxes compared without a branch

// Kept boxes of one class, as a structure of arrays. Free slots hold NaN, which overlaps nothing.
struct Block {
  float x1[kBlock], y1[kBlock], x2[kBlock], y2[kBlock], area[kBlock];
};

FCOS_CLONES bool any_exceeds(
    const Block* blocks, int64_t count, const float* box, float threshold) {
  float box_area = area(box);
  for (const Block* block = blocks; block < blocks + count; ++block) {
    int any = 0;
    for (int i = 0; i < kBlock; ++i) {
      Overlap o = overlap(
          block->x1[i], block->y1[i], block->x2[i], block->y2[i], block->area[i], box[0], box[1],
          box[2], box[3], box_area);
      any |= o.exceeds(threshold);
    }
    if (any) {
      return true;
    }
  }
  return false;
}

// Maps arbitrary ids to 0, 1, ...
std::vector<int32_t> dense_ids(const int64_t* ids, int64_t count) {
  std::vector<int32_t> dense(count);
  auto [lowest, highest] = std::minmax_element(ids, ids + count);
  // Unsigned, since the difference of signed numbers can overflow.
  uint64_t range = count ? uint64_t(*highest) - uint64_t(*lowest) : 0;
  if (range < uint64_t(4 * count)) {
    std::transform(ids, ids + count, dense.begin(), [&](int64_t id) { return id - *lowest; });
    return dense;
  }
  std::unordered_map<int64_t, int32_t> known;
  for (int64_t i = 0; i < count; ++i) {
    dense[i] = known.try_emplace(ids[i], int32_t(known.size())).first->second;
  }
  return dense;
}

// Boxes kept so far, in memory allocated once.
class Kept {
 public:
  Kept(std::vector<int32_t> classes, float threshold, float pixel_extent)
      : classes_(std::move(classes)), threshold_(threshold), pixel_extent_(pixel_extent) {
    int32_t highest = classes_.empty() ? -1 : *std::max_element(classes_.begin(), classes_.end());
    first_block_.assign(size_t(highest) + 2, 0);
    count_.assign(size_t(highest) + 1, 0);
    for (int32_t id : classes_) {
      ++first_block_[id + 1];
    }
    for (size_t id = 0; id + 1 < first_block_.size(); ++id) {
      first_block_[id + 1] = first_block_[id] + (first_block_[id + 1] + kBlock - 1) / kBlock;
    }
    Block empty;
    std::memset(&empty, 0xff, sizeof empty); // NaN
    blocks_.assign(size_t(first_block_.back()), empty);
  }

  // Keeps the box unless a kept box of its class suppresses it; returns whether it was kept.
  bool keep(int64_t index, const float* given) {
    float box[4] = {given[0], given[1], given[2] + pixel_extent_, given[3] + pixel_extent_};
    int32_t id = classes_[index];
    Block* blocks = blocks_.data() + first_block_[id];
    int64_t& count = count_[id];
    if (any_exceeds(blocks, (count + kBlock - 1) / kBlock, box, threshold_)) {
      return false;
    }
    Block& block = blocks[count / kBlock];
    int lane = int(count++ % kBlock);
    block.x1[lane] = box[0], block.y1[lane] = box[1], block.x2[lane] = box[2];
    block.y2[lane] = box[3], block.area[lane] = area(box);
    return true;
  }

 private:
  std::vector<int32_t> classes_;
  float threshold_, pixel_extent_;
  std::vector<int64_t> first_block_, count_; // by class
  std::vector<Block> blocks_;
};

struct Ranked {
  uint32_t bits;
  int32_t index;
  bool operator<(const Ranked& other) const { // for a heap with the best box on top
    return bits != other.bits ? bits < other.bits : index > other.index;
  }
};

struct Writer {
  const PaddedNms& args;
  int64_t image, count = 0;

  void put(int64_t index, float score) {
    int64_t in = image * args.num_boxes + index, out = image * args.max_detections + count++;
    std::copy_n(args.boxes + 4 * in, 4, args.kept_boxes + 4 * out);
    args.kept_scores[out] = score;
    args.kept_classes[out] = args.classes[in];
  }

  void finish() {
    args.counts[image] = int32_t(count);
    for (; count < args.max_detections; ++count) {
      int64_t out = image * args.max_detections + count;
      std::fill_n(args.kept_boxes + 4 * out, 4, 0.0f);
      args.kept_scores[out] = 0;
      args.kept_classes[out] = -1;
    }
  }
};

void hard_nms(const PaddedNms& args, int64_t image) {
  int64_t base = image * args.num_boxes;
  std::vector<Ranked> heap;
  for (int64_t i = 0; i < args.num_boxes; ++i) {
    float score = args.scores[base + i];
    if (args.classes[base + i] >= 0 && score > -kInfinity) { // false for NaN
      heap.push_back({ordered_bits(score), int32_t(i)});
    }
  }
  std::make_heap(heap.begin(), heap.end());
  const int64_t* classes = args.classes + base;
  Kept kept(
      args.class_agnostic ? std::vector<int32_t>(args.num_boxes, 0)
                          : dense_ids(classes, args.num_boxes),
      args.iou_threshold, args.pixel_extent);
  Writer out{args, image};
  while (!heap.empty() && out.count < args.max_detections) {
    std::pop_heap(heap.begin(), heap.end());
    int64_t i = heap.back().index;
    heap.pop_back();
    if (kept.keep(i, args.boxes + 4 * (base + i))) {
      out.put(i, args.scores[base + i]);
    }
  }
  out.finish();
}

void soft_nms(const PaddedNms& args, int64_t image) {
  int64_t base = image * args.num_boxes;
  const float* boxes = args.boxes + 4 * base;
  std::vector<float> extended;
  if (args.pixel_extent != 0) {
    extended.assign(boxes, boxes + 4 * args.num_boxes);
    for (size_t i = 0; i < extended.size(); i += 4) {
      extended[i + 2] += args.pixel_extent, extended[i + 3] += args.pixel_extent;
    }
    boxes = extended.data();
  }
  const int64_t* classes = args.classes + base;
  std::vector<float> alive(args.scores + base, args.scores + base + args.num_boxes);
  for (int64_t i = 0; i < args.num_boxes; ++i) {
    alive[i] = classes[i] >= 0 && alive[i] == alive[i] ? alive[i] : -kInfinity;
  }
  Writer out{args, image};
  while (out.count < std::min(args.max_detections, args.num_boxes)) {
    int64_t best = std::max_element(alive.begin(), alive.end()) - alive.begin();
    if (!(alive[best] > -kInfinity)) {
      break;
    }
    const float* box = boxes + 4 * best;
    out.put(best, alive[best]);
    alive[best] = -kInfinity;
    for (int64_t i = 0; i < args.num_boxes; ++i) {
      if (!(alive[i] > -kInfinity) || !(args.class_agnostic || classes[i] == classes[best])) {
        continue;
      }
      const float* other = boxes + 4 * i;
      Overlap o = overlap(box, other);
      if (args.method == NmsMethod::kGaussian) {
        alive[i] *= exp_of_negative(-mul_rn(o.iou(), o.iou()) / args.sigma);
      } else if (o.exceeds(args.iou_threshold)) {
        alive[i] *= 1 - o.iou();
      }
    }
    for (float& score : alive) {
      score = score > args.min_score ? score : -kInfinity;
    }
  }
  out.finish();
}

// Radix sort: indices by descending score, NaN first, ties by ascending index.
std::vector<int64_t> descending_order(const double* scores, int64_t num_boxes) {
  struct Item {
    uint64_t key;
    int64_t index;
  };
  std::vector<Item> items(num_boxes), other(num_boxes);
  for (int64_t i = 0; i < num_boxes; ++i) {
    double x = scores[i] + 0.0;
    uint64_t bits = bits_as<uint64_t>(x);
    uint64_t ascending = bits >> 63 ? ~bits : bits | (uint64_t(1) << 63);
    items[i] = {x == x ? ~ascending : 0, i};
  }
  constexpr int kBits = 11;
  for (int shift = 0; shift < 64; shift += kBits) {
    std::array<int64_t, (1 << kBits) + 1> start{};
    for (const Item& item : items) {
      ++start[((item.key >> shift) & ((1 << kBits) - 1)) + 1];
    }
    if (std::find(start.begin() + 1, start.end(), num_boxes) != start.end()) {
      continue; // all keys share these bits
    }
    std::partial_sum(start.begin(), start.end(), start.begin());
    for (const Item& item : items) {
      other[start[(item.key >> shift) & ((1 << kBits) - 1)]++] = item;
    }
    items.swap(other);
  }
  std::vector<int64_t> order(num_boxes);
  std::transform(items.begin(), items.end(), order.begin(), [](const Item& i) { return i.index; });
  return order;
}

} // namespace

void batched_nms_padded(const PaddedNms& args, ParallelFor parallel_for) {
  parallel_for(
      args.num_images, 1 + kGrain / (args.num_boxes + 1), [&](int64_t first, int64_t last) {
        for (int64_t image = first; image < last; ++image) {
          args.method == NmsMethod::kHard ? hard_nms(args, image) : soft_nms(args, image);
        }
      });
}

std::vector<int64_t> batched_nms(
    const float* boxes, const double* scores, const int64_t* groups, int64_t num_boxes,
    float iou_threshold) {
  Kept kept(dense_ids(groups, num_boxes), iou_threshold, 0);
  std::vector<int64_t> indices;
  for (int64_t i : descending_order(scores, num_boxes)) {
    if (kept.keep(i, boxes + 4 * i)) {
      indices.push_back(i);
    }
  }
  return indices;
}

} // namespace fcos::cpu
