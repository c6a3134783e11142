// Computes scores from logits. All operations round as in IEEE 754 and none are fused, so CPU and
// GPU agree bitwise, and select the same candidates in the same order.
#pragma once

#include "arguments.h"
#include "platform.h"

namespace fcos {

constexpr float kLowestExponent = -87.0f; // e^x is negligible below and normal above

// e^x for kLowestExponent <= x <= 0, with a relative error of at most 1.2e-7. `Bits` is uint32_t,
// or a vector of them if `Number` is a vector.
template <class Number, class Bits>
FCOS_HD Number exp_polynomial(Number x) {
  const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  Number shifted = mul_rn(x, 1.44269504088896341f) + magic;
  Number n = shifted - magic;
  Number r = x - mul_rn(n, 0.693359375f);
  r = r + mul_rn(n, 2.12194440e-4f);
  Number p = mul_rn(r, 1.9875691500e-4f) + 1.3981999507e-3f;
  p = mul_rn(p, r) + 8.3334519073e-3f;
  p = mul_rn(p, r) + 4.1665795894e-2f;
  p = mul_rn(p, r) + 1.6666665459e-1f;
  p = mul_rn(p, r) + 5.0000001201e-1f;
  p = mul_rn(p, mul_rn(r, r)) + r + 1.0f;
  // Multiplies by 2^n by adding n to the exponent; the low bits of `shifted` are n.
  return bits_as<Number>(bits_as<Bits>(p) + (bits_as<Bits>(shifted) << 23));
}

// e^x for x <= 0; 0 below kLowestExponent.
FCOS_HD float exp_of_negative(float x) {
  float e = exp_polynomial<float, uint32_t>(x < kLowestExponent ? kLowestExponent : x);
  return x != x ? x : x < kLowestExponent ? 0.0f : e;
}

// 1 / (1 + e^-x); 0 for x below kLowestExponent, NaN for NaN.
template <class Number, class Bits>
FCOS_HD Number sigmoid(Number x) {
  const Number zero{}, lowest = zero + kLowestExponent;
  Number magnitude = x < 0 ? x : -x;
  Number e = exp_polynomial<Number, Bits>(magnitude < lowest ? lowest : magnitude);
  Number r = 1.0f / (1.0f + e);
  Number out = x < 0 ? mul_rn(e, r) : r;
  out = x < lowest ? zero : out;
  return x != x ? x : out;
}
FCOS_HD float sigmoid(float x) { return sigmoid<float, uint32_t>(x); }

// A (point, class) pair is a candidate if its class probability, or the product of class
// probability and quality, exceeds the threshold. NaN never does.
FCOS_HD bool passes(const SelectCandidates& args, float cls, float product) {
  return (args.threshold_with_quality ? product : cls) > args.threshold && product == product;
}

FCOS_HD float rank_of(const SelectCandidates& args, float cls, float product) {
  return args.rank_with_quality ? product : cls;
}

FCOS_HD float score_of(const SelectCandidates& args, float cls, float product) {
  return args.score_rule == ScoreRule::kSqrt      ? std::sqrt(product)
         : args.score_rule == ScoreRule::kProduct ? product
                                                  : cls;
}

// Decodes a candidate's box. Returns false if the candidate must be dropped.
FCOS_HD bool make_box(
    const SelectCandidates& args, int level, int64_t image, int64_t point, const float* ltrb,
    float* box) {
  decode_box(args.levels.level[level], point, ltrb, box);
  if (!is_finite(box)) {
    return false;
  }
  if (args.clip) {
    const int64_t* size = args.image_sizes + 2 * image;
    clip_box(float(size[0]) - args.pixel_extent, float(size[1]) - args.pixel_extent, box);
  }
  return !args.drop_empty || (box[0] < box[2] && box[1] < box[3]);
}

// A lower bound on the class logits whose probability, including rounding, exceeds `probability`.
FCOS_HD float logit_below(float probability) {
  constexpr float kSlack = 1e-3f;
  constexpr float kSteep = 6.0f; // above, the logit is too steep in the probability for the slack
  float logit = std::log(probability / (1 - probability));
  return (logit < kSteep ? logit : kSteep) - kSlack; // kSteep for NaN, too
}

// A lower bound on the class logits of candidates at a point of this quality. Logits above it must
// be scored exactly.
FCOS_HD float logit_bound(const SelectCandidates& args, float quality) {
  if (!args.threshold_with_quality) {
    return quality != quality ? INFINITY : logit_below(args.threshold);
  }
  return quality > args.threshold ? logit_below(args.threshold / quality) : INFINITY;
}

} // namespace fcos
