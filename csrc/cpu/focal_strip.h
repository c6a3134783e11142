// The inner loop of sigmoid_focal_loss over one contiguous run of logits. It is compiled once per
// instruction set (focal_strip_*.cpp); sigmoid_focal_loss.cpp chooses at run time.
#pragma once

#include "numbers.h"

namespace fcos::cpu {

// n logits side by side in memory. In a channel plane they are points of one class: `labels` has a
// label per logit and `channel` is the class. In a pixel of a channels_last map they are the classes
// from `channel` on of one point: `labels` has that point's label only.
struct FocalStrip {
  const void* logits;
  void* grad; // null where no gradient is wanted
  const int32_t* labels;
  int64_t size;
  int32_t channel;
  bool is_pixel;
};

struct FocalOptions {
  DType dtype;
  double alpha, gamma;
  double scale; // of the gradient
  bool wants_loss;
};

// The loss of the strip where it is wanted; writes the gradient where there is room for it.
using FocalStripKernel = double (*)(const FocalStrip&, const FocalOptions&);

double focal_strip_baseline(const FocalStrip&, const FocalOptions&);
double focal_strip_avx2(const FocalStrip&, const FocalOptions&);
double focal_strip_avx512(const FocalStrip&, const FocalOptions&);

} // namespace fcos::cpu
