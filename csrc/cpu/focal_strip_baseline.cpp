// The inner loop of sigmoid_focal_loss for any processor.
#define FCOS_ISA baseline
#include "focal_strip.inl"
