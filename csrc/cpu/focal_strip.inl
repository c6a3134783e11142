// Body of focal_strip_*.cpp. FCOS_ISA names the instruction set; on x86, FCOS_REGISTERS is the
// width of its registers in bits (the compiler's macros ignore the pragma). Only the last function
// may have external linkage: copies in other files are compiled for other processors.

#ifdef FCOS_REGISTERS
#include <immintrin.h>
#endif

#include "../core/focal.h"
#include "focal_strip.h"
#include "numbers.h"

namespace fcos::cpu {
namespace {

constexpr int kFlush = 64; // vectors whose losses are summed in float before double

FCOS_HD Floats broadcast(double x) { return Floats{} + float(x); }

template <class T>
FCOS_HD Floats load(const T* x) {
  Floats out;
  if constexpr (sizeof(T) == 4) {
    std::memcpy(&out, x, sizeof out);
  } else {
    for (int i = 0; i < kLanes; ++i) {
      out[i] = widen(x[i]);
    }
  }
  return out;
}

template <class T>
FCOS_HD void store(const Floats& x, T* out) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(out, &x, sizeof x);
  } else {
    for (int i = 0; i < kLanes; ++i) {
      narrow(x[i], out + i);
    }
  }
}

#ifdef FCOS_REGISTERS
// Without intrinsics, the conversions take longer than the loss itself.

FCOS_HD Floats load(const BFloat16* x) {
  uint16_t words __attribute__((vector_size(2 * kLanes)));
  std::memcpy(&words, x, sizeof words);
  return (Floats)(__builtin_convertvector(words, Ints) << 16);
}

FCOS_HD void store(const Floats& x, BFloat16* out) { // see narrow()
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
  Bits bits = (Bits)x;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = x == x ? bits : Bits{} + 0x7fc0;
#if FCOS_REGISTERS == 512
  __m256i packed = _mm512_cvtepi32_epi16((__m512i)bits);
#else
  __m256i half[2];
  std::memcpy(half, &bits, sizeof bits);
  // packus packs within each half of a register, so the quarters come out as 0, 2, 1, 3.
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half[0], half[1]), 0xd8);
#endif
  std::memcpy(out, &packed, sizeof packed);
}

FCOS_HD Floats load(const Half* x) {
#if FCOS_REGISTERS == 512
  __m256i words;
  std::memcpy(&words, x, sizeof words);
  return (Floats)_mm512_cvtph_ps(words);
#else
  __m128i words[2];
  std::memcpy(words, x, sizeof words);
  __m256 half[] = {_mm256_cvtph_ps(words[0]), _mm256_cvtph_ps(words[1])};
  Floats out;
  std::memcpy(&out, half, sizeof out);
  return out;
#endif
}

FCOS_HD void store(const Floats& x, Half* out) {
#if FCOS_REGISTERS == 512
  __m256i words = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  __m256 half[2];
  std::memcpy(half, &x, sizeof x);
  __m128i words[] = {
      _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT),
      _mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT)};
#endif
  std::memcpy(out, &words, sizeof words);
}
#endif

// Which lanes from i on are the true class of their point, and which are not ignored.
struct Lanes {
  Ints is_true, active;
};

FCOS_HD Lanes lanes(const FocalStrip& strip, int64_t i) {
  const Ints iota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Ints label, channel;
  if (strip.is_pixel) {
    label = Ints{} + strip.labels[0];
    channel = iota + int32_t(strip.channel + i);
  } else {
    std::memcpy(&label, strip.labels + i, sizeof label);
    channel = Ints{} + strip.channel;
  }
  return {label == channel, label != -1};
}

template <int Gamma, bool Loss, bool Grad>
struct Loop {
  Floats weight_true, weight_other, gamma, scale;
  double total = 0;
  Floats partial = {};

  explicit Loop(const FocalOptions& options)
      : weight_true(broadcast(options.alpha < 0 ? 1 : options.alpha)),
        weight_other(broadcast(options.alpha < 0 ? 1 : 1 - options.alpha)),
        gamma(broadcast(options.gamma)),
        scale(broadcast(options.scale)) {}

  // Adds the losses and returns the gradient of one vector of logits.
  FCOS_HD Floats step(Floats x, const Lanes& lane) {
    const Floats zero{};
    Floats z = lane.is_true ? -x : x;
    Floats weight = lane.is_true ? weight_true : weight_other;
    z = lane.active ? z : zero; // an ignored logit may be NaN
    weight = lane.active ? weight : zero;
    FocalTerms<Floats> terms = focal_terms<VectorMath, Gamma>(z, gamma);
    if constexpr (Loss) {
      partial += weight * terms.loss;
    }
    if constexpr (!Grad) {
      return x;
    }
    return scale * (lane.is_true ? -weight : weight) * terms.slope;
  }

  void flush() {
    for (int i = 0; i < kLanes && Loss; ++i) {
      total += partial[i];
    }
    partial = Floats{};
  }
};

// The last, incomplete vector of a strip; its missing lanes are ignored.
template <class T>
struct Tail {
  T logits[kLanes] = {};
  int32_t labels[kLanes];
  FocalStrip strip;
  int count;

  Tail(const FocalStrip& whole, int64_t first) : strip(whole), count(int(whole.size - first)) {
    std::memcpy(logits, static_cast<const T*>(whole.logits) + first, sizeof(T) * count);
    strip.channel += whole.is_pixel ? int32_t(first) : 0;
    for (int i = 0; i < kLanes && !whole.is_pixel; ++i) {
      labels[i] = i < count ? whole.labels[first + i] : -1;
    }
    strip.labels = whole.is_pixel ? whole.labels : labels;
  }

  // Lanes beyond the last class are inactive.
  Lanes masked() const {
    Lanes lane = lanes(strip, 0);
    for (int i = count; i < kLanes; ++i) {
      lane.active[i] = 0;
    }
    return lane;
  }
};

template <class T, int Gamma, bool Loss, bool Grad>
double run(const FocalStrip& strip, const FocalOptions& options) {
  const T* logits = static_cast<const T*>(strip.logits);
  T* grad = static_cast<T*>(strip.grad);
  Loop<Gamma, Loss, Grad> loop(options);
  int64_t i = 0, whole = strip.size / kLanes * kLanes;
  while (i < whole) {
    int64_t stop = i + kFlush * kLanes < whole ? i + kFlush * kLanes : whole;
    for (; i < stop; i += kLanes) {
      Floats slopes = loop.step(load(logits + i), lanes(strip, i));
      if constexpr (Grad) {
        store(slopes, grad + i);
      }
    }
    loop.flush();
  }
  if (i < strip.size) {
    Tail<T> tail(strip, i);
    Floats slopes = loop.step(load(tail.logits), tail.masked());
    if constexpr (Grad) {
      T out[kLanes];
      store(slopes, out);
      std::memcpy(grad + i, out, sizeof(T) * tail.count);
    }
    loop.flush();
  }
  return loop.total;
}

// float64 is for gradient checks: scalar, in full precision.
double run_in_double(const FocalStrip& strip, const FocalOptions& options) {
  const double* logits = static_cast<const double*>(strip.logits);
  double* grad = static_cast<double*>(strip.grad);
  double total = 0;
  for (int64_t i = 0; i < strip.size; ++i) {
    int32_t label = strip.labels[strip.is_pixel ? 0 : i];
    bool is_true = label == strip.channel + (strip.is_pixel ? int32_t(i) : 0);
    double alpha = options.alpha;
    double weight = alpha < 0 ? 1 : is_true ? alpha : 1 - alpha;
    weight = label == -1 ? 0 : weight;
    double z = label == -1 ? 0 : is_true ? -logits[i] : logits[i];
    auto terms = focal_terms<ScalarMath<double>, -1>(z, options.gamma);
    total += weight * terms.loss;
    if (grad) {
      grad[i] = options.scale * (is_true ? -weight : weight) * terms.slope;
    }
  }
  return total;
}

template <class T, int Gamma>
double run(const FocalStrip& strip, const FocalOptions& options) {
  if (!strip.grad) {
    return run<T, Gamma, true, false>(strip, options);
  } else if (options.wants_loss) {
    return run<T, Gamma, true, true>(strip, options);
  } else {
    return run<T, Gamma, false, true>(strip, options);
  }
}

template <class T>
double run(const FocalStrip& strip, const FocalOptions& options) {
  if constexpr (sizeof(T) == 8) {
    return run_in_double(strip, options);
  } else if (options.gamma == 2) {
    return run<T, 2>(strip, options);
  } else if (options.gamma == 1) {
    return run<T, 1>(strip, options);
  } else if (options.gamma == 0) {
    return run<T, 0>(strip, options);
  } else {
    return run<T, -1>(strip, options);
  }
}

} // namespace

#define FCOS_NAME_(prefix, isa) prefix##isa
#define FCOS_NAME(prefix, isa) FCOS_NAME_(prefix, isa)

double FCOS_NAME(focal_strip_, FCOS_ISA)(const FocalStrip& strip, const FocalOptions& options) {
  return dispatch(options.dtype, [&](auto zero) { return run<decltype(zero)>(strip, options); });
}

} // namespace fcos::cpu
