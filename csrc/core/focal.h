// Sigmoid focal loss and its gradient (1708.02002), with one formula for positives and negatives.
//
// With z = -x for the true class and z = x for every other, p = sigmoid(z) is the probability of
// being wrong, and
//   loss = w p^g softplus(z),   d loss / dz = w p^g (g (1 - p) softplus(z) + p),
// where w is alpha for the true class and 1 - alpha for others, and dz/dx is the sign. Both are
// finite for every finite z and every g >= 0.
#pragma once

#include "platform.h"

namespace fcos {

template <class T>
struct FocalTerms {
  T loss, slope; // without the weight
};

template <class T>
FCOS_HD T magnitude(T z) {
  return z < 0 ? -z : z;
}
FCOS_HD float magnitude(float z) { // free on a GPU: a modifier of the instruction that uses it
  return std::fabs(z);
}

// `Gamma` is 0, 1 or 2, or -1 to use the argument `gamma`.
template <class Math, int Gamma>
FCOS_HD FocalTerms<typename Math::Number> focal_terms(
    typename Math::Number z, typename Math::Number gamma) {
  using T = typename Math::Number;
  const T zero{};
  T e = Math::exp(-magnitude(z));
  T r = Math::reciprocal(1.0f + e);
  T near_one = r, near_zero = e * r; // sigmoid(|z|) and sigmoid(-|z|), both to full precision
  T p = z < 0 ? near_zero : near_one;
  T rest = z < 0 ? near_one : near_zero;
  T softplus = (z < 0 ? zero : z) + Math::log1p(e);
  T power, inner;
  if constexpr (Gamma == 0) {
    power = 1.0f + zero;
    inner = p;
  } else if constexpr (Gamma == 1) {
    power = p;
    inner = rest * softplus + p;
  } else if constexpr (Gamma == 2) {
    power = p * p;
    inner = 2.0f * rest * softplus + p;
  } else {
    power = Math::pow(p, gamma);
    inner = gamma * rest * softplus + p;
  }
  return {power * softplus, power * inner};
}

} // namespace fcos
