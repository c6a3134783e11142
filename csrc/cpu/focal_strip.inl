// Body of focal_strip_*.cpp; FCOS_ISA names the instruction set. Nothing here may have external
// linkage but the two functions at the end: another file's copy was compiled for other processors.

#include "../core/focal.h"
#include "focal_strip.h"
#include "numbers.h"

namespace fcos::cpu {
namespace {

constexpr int kFlush = 64; // vectors whose losses are added in float before going to double

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

// Which of the lanes from i on are their point's true class, and which count at all.
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

struct Loop {
  Floats weight_true, weight_other, gamma;

  explicit Loop(const FocalOptions& options)
      : weight_true(broadcast(options.alpha < 0 ? 1 : options.alpha)),
        weight_other(broadcast(options.alpha < 0 ? 1 : 1 - options.alpha)),
        gamma(broadcast(options.gamma)) {}

  template <int Gamma>
  FCOS_HD Floats loss(Floats x, const Lanes& lane) const {
    Floats z = lane.is_true ? -x : x;
    Floats weight = lane.is_true ? weight_true : weight_other;
    weight = lane.active ? weight : Floats{};
    return weight * focal_terms<VectorMath, Gamma>(z, gamma).loss;
  }

  template <int Gamma>
  FCOS_HD Floats slope(Floats x, const Lanes& lane, Floats scale) const {
    Floats z = lane.is_true ? -x : x;
    Floats weight = lane.is_true ? -weight_true : weight_other;
    weight = lane.active ? weight : Floats{};
    return scale * weight * focal_terms<VectorMath, Gamma>(z, gamma).slope;
  }
};

// The last, incomplete vector of a strip: its missing lanes are ignored points.
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

  // Classes beyond the last are no classes.
  Lanes masked() const {
    Lanes lane = lanes(strip, 0);
    for (int i = count; i < kLanes; ++i) {
      lane.active[i] = 0;
    }
    return lane;
  }
};

double sum(const Floats& x) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) {
    total += x[i];
  }
  return total;
}

template <class T, int Gamma>
double forward(const FocalStrip& strip, const FocalOptions& options) {
  const T* logits = static_cast<const T*>(strip.logits);
  Loop loop(options);
  double total = 0;
  int64_t i = 0, whole = strip.size / kLanes * kLanes;
  while (i < whole) {
    int64_t stop = i + kFlush * kLanes < whole ? i + kFlush * kLanes : whole;
    Floats partial = {};
    for (; i < stop; i += kLanes) {
      partial += loop.loss<Gamma>(load(logits + i), lanes(strip, i));
    }
    total += sum(partial);
  }
  if (i < strip.size) {
    Tail<T> tail(strip, i);
    total += sum(loop.loss<Gamma>(load(tail.logits), tail.masked()));
  }
  return total;
}

template <class T, int Gamma>
void backward(const FocalStrip& strip, const FocalOptions& options) {
  const T* logits = static_cast<const T*>(strip.logits);
  T* grad = static_cast<T*>(strip.grad);
  Loop loop(options);
  Floats scale = broadcast(options.scale);
  int64_t i = 0;
  for (; i + kLanes <= strip.size; i += kLanes) {
    store(loop.slope<Gamma>(load(logits + i), lanes(strip, i), scale), grad + i);
  }
  if (i < strip.size) {
    Tail<T> tail(strip, i);
    T out[kLanes];
    store(loop.slope<Gamma>(load(tail.logits), tail.masked(), scale), out);
    std::memcpy(grad + i, out, sizeof(T) * tail.count);
  }
}

// float64 is for checking gradients: one by one, in full precision.
template <bool Backward>
double in_double(const FocalStrip& strip, const FocalOptions& options) {
  const double* logits = static_cast<const double*>(strip.logits);
  double* grad = static_cast<double*>(strip.grad);
  double total = 0;
  for (int64_t i = 0; i < strip.size; ++i) {
    int32_t label = strip.labels[strip.is_pixel ? 0 : i];
    bool is_true = label == strip.channel + (strip.is_pixel ? int32_t(i) : 0);
    double alpha = options.alpha;
    double weight = alpha < 0 ? 1 : is_true ? alpha : 1 - alpha;
    weight = label == -1 ? 0 : weight;
    auto terms = focal_terms<ScalarMath<double>, -1>(is_true ? -logits[i] : logits[i], options.gamma);
    if constexpr (Backward) {
      grad[i] = options.scale * (is_true ? -weight : weight) * terms.slope;
    } else {
      total += weight * terms.loss;
    }
  }
  return total;
}

template <class T>
double forward(const FocalStrip& strip, const FocalOptions& options) {
  if constexpr (sizeof(T) == 8) {
    return in_double<false>(strip, options);
  } else if (options.gamma == 2) {
    return forward<T, 2>(strip, options);
  } else if (options.gamma == 1) {
    return forward<T, 1>(strip, options);
  } else if (options.gamma == 0) {
    return forward<T, 0>(strip, options);
  } else {
    return forward<T, -1>(strip, options);
  }
}

template <class T>
void backward(const FocalStrip& strip, const FocalOptions& options) {
  if constexpr (sizeof(T) == 8) {
    in_double<true>(strip, options);
  } else if (options.gamma == 2) {
    backward<T, 2>(strip, options);
  } else if (options.gamma == 1) {
    backward<T, 1>(strip, options);
  } else if (options.gamma == 0) {
    backward<T, 0>(strip, options);
  } else {
    backward<T, -1>(strip, options);
  }
}

} // namespace

#define FCOS_NAME_(prefix, isa) prefix##isa
#define FCOS_NAME(prefix, isa) FCOS_NAME_(prefix, isa)

double FCOS_NAME(focal_forward_, FCOS_ISA)(const FocalStrip& strip, const FocalOptions& options) {
  return dispatch(options.dtype, [&](auto zero) { return forward<decltype(zero)>(strip, options); });
}

void FCOS_NAME(focal_backward_, FCOS_ISA)(const FocalStrip& strip, const FocalOptions& options) {
  dispatch(options.dtype, [&](auto zero) { backward<decltype(zero)>(strip, options); });
}

} // namespace fcos::cpu
