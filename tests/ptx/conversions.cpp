// Conversion instructions.
#include <cmath>
#include <limits>
#include <string>

#include "elementwise.h"

namespace ptx {
namespace {

template <class To, class From>
To convert(From x) {
  return To(x);
}

// Converts the low part of a 64-bit register.
template <class To, class From>
To convert_low(uint64_t x) {
  return To(From(x));
}

template <class To, class From>
To truncate(From x) { // saturates; NaN becomes 0
  constexpr auto kMin = double(std::numeric_limits<To>::min());
  constexpr auto kMax = double(std::numeric_limits<To>::max());
  double y = std::trunc(double(x));
  return y != y      ? To(0)
         : y <= kMin ? std::numeric_limits<To>::min()
         : y >= kMax ? std::numeric_limits<To>::max()
                     : To(y);
}

float saturate(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; } // NaN becomes 0

float from_bfloat16(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
BFloat16 to_bfloat16(float x) {
  auto bits = std::bit_cast<uint32_t>(x);
  return {x != x ? uint16_t(0x7fff) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <class T, T (*Convert)(float)>
uint32_t to_pair(float high, float low) {
  return uint32_t(std::bit_cast<uint16_t>(Convert(high))) << 16 |
         std::bit_cast<uint16_t>(Convert(low));
}

template <class From>
void add_conversions_of(Table& table, const std::string& from) {
  auto add = [&]<class To>(To, const char* to) {
    std::string types = std::string(to) + "." + from;
    if constexpr (std::is_integral_v<From>) {
      table["cvt." + types] = elementwise<convert<To, From>>();
      table["cvt." + types + ".8"] = elementwise<convert_low<To, From>>();
    } else {
      table["cvt.rzi." + types] = elementwise<truncate<To, From>>();
    }
  };
  add(int16_t{}, "s16"), add(uint16_t{}, "u16"), add(int32_t{}, "s32"), add(uint32_t{}, "u32");
  add(int64_t{}, "s64"), add(uint64_t{}, "u64");
  if constexpr (std::is_integral_v<From>) {
    add(int8_t{}, "s8"), add(uint8_t{}, "u8");
    table["cvt.rn.f32." + from] = elementwise<convert<float, From>>();
    table["cvt.rn.f64." + from] = elementwise<convert<double, From>>();
  }
}

} // namespace

void add_conversions(Table& table) {
  add_conversions_of<int8_t>(table, "s8"), add_conversions_of<uint8_t>(table, "u8");
  add_conversions_of<int16_t>(table, "s16"), add_conversions_of<uint16_t>(table, "u16");
  add_conversions_of<int32_t>(table, "s32"), add_conversions_of<uint32_t>(table, "u32");
  add_conversions_of<int64_t>(table, "s64"), add_conversions_of<uint64_t>(table, "u64");
  add_conversions_of<float>(table, "f32"), add_conversions_of<double>(table, "f64");
  table["cvt.f64.f32"] = elementwise<convert<double, float>>();
  table["cvt.rn.f32.f64"] = elementwise<convert<float, double>>();
  table["cvt.sat.f32.f32"] = elementwise<saturate>();
  table["cvt.f32.f16"] = elementwise<convert<float, _Float16>>();
  table["cvt.rn.f16.f32"] = elementwise<convert<_Float16, float>>();
  table["cvt.f32.bf16"] = elementwise<from_bfloat16>();
  table["cvt.rn.bf16.f32"] = elementwise<to_bfloat16>();
  table["cvt.rn.f16x2.f32"] = elementwise<to_pair<_Float16, convert<_Float16, float>>>();
  table["cvt.rn.bf16x2.f32"] = elementwise<to_pair<BFloat16, to_bfloat16>>();
  for (const char* cvta : {"cvta.to.global.u64", "cvta.global.u64", "cvta.param.u64"}) {
    table[cvta] = elementwise<convert<uint64_t, uint64_t>>(); // these share one address space
  }
}

} // namespace ptx
