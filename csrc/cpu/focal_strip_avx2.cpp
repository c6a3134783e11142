// The inner loop of sigmoid_focal_loss for x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v3")
#define FCOS_ISA avx2
#define FCOS_REGISTERS 256
#include "focal_strip.inl"
#endif
