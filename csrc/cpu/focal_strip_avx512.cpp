// The inner loop of sigmoid_focal_loss for x86-64 with AVX-512.
#if defined(__x86_64__)
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FCOS_ISA avx512
#define FCOS_REGISTERS 512
#include "focal_strip.inl"
#endif
