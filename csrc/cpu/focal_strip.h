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
  void* grad; // null in a forward pass
  const int32_t* labels;
  int64_t size;
  int32_t channel;
  bool is_pixel;
};

struct FocalOptions {
  DType dtype;
  double alpha, gamma, scale; // scale: of the gradient
};

using FocalForward = double (*)(const FocalStrip&, const FocalOptions&);
using FocalBackward = void (*)(const FocalStrip&, const FocalOptions&);

double focal_forward_baseline(const FocalStrip&, const FocalOptions&);
void focal_backward_baseline(const FocalStrip&, const FocalOptions&);
double focal_forward_avx2(const FocalStrip&, const FocalOptions&);
void focal_backward_avx2(const FocalStrip&, const FocalOptions&);
double focal_forward_avx512(const FocalStrip&, const FocalOptions&);
void focal_backward_avx512(const FocalStrip&, const FocalOptions&);

} // namespace fcos::cpu
