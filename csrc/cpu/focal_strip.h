// The inner loop of sigmoid_focal_loss, over one contiguous strip of logits. It is compiled once
// per instruction set (focal_strip_*.cpp); sigmoid_focal_loss.cpp selects one at run time.
#pragma once

#include "numbers.h"

namespace fcos::cpu {

// Contiguous logits. In a channel plane, they are points of one class: `labels` has a label per
// logit, and `channel` is the class. In a pixel of a channels_last map, they are the classes of one
// point from `channel` on: `labels` only has the label of that point.
struct FocalStrip {
  const void* logits;
  void* grad; // null for no gradient
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

// Returns the loss if `wants_loss`, and writes the gradient unless `grad` is null.
using FocalStripKernel = double (*)(const FocalStrip&, const FocalOptions&);

double focal_strip_baseline(const FocalStrip&, const FocalOptions&);
double focal_strip_avx2(const FocalStrip&, const FocalOptions&);
double focal_strip_avx512(const FocalStrip&, const FocalOptions&);

} // namespace fcos::cpu
