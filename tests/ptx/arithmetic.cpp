// Instructions that compute, each lane for itself. Only those that the compiler has used so far are
// here; the decoder refuses a file with any other.

#include <cfenv>
#include <cmath>
#include <limits>
#include <string>

#include "elementwise.h"

namespace ptx {
namespace {

// ---- arithmetic ----

template <class T>
T add(T a, T b) {
  return T(a + b);
}
template <class T>
T subtract(T a, T b) {
  return T(a - b);
}
template <class T>
T multiply(T a, T b) {
  return T(a * b);
}
template <class T>
T multiply_add(T a, T b, T c) {
  return T(a * b + c);
}
template <class T>
T negate(T a) {
  return T(-a);
}
template <class T>
T both(T a, T b) {
  return T(a & b);
}
template <class T>
T either(T a, T b) {
  return T(a | b);
}
template <class T>
T exclusive(T a, T b) {
  return T(a ^ b);
}
template <class T>
T invert(T a) {
  return T(~a);
}
template <class T>
T copy(T a) {
  return a;
}
template <class T>
T select(T a, T b, Predicate p) {
  return p.value ? a : b;
}

template <class T>
T divide(T a, T b) {
  return std::is_integral_v<T> && b == 0 ? T(-1) : T(a / b);
}
template <class T>
T remainder(T a, T b) {
  return b == 0 ? a : T(a % b);
}

template <class T>
T magnitude(T a) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::fabs(a);
  } else {
    return a < 0 ? T(-a) : a;
  }
}

// Of a NaN and a number, the number; -0 is less than 0.
template <class T>
T smaller(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    bool first = a < b || b != b || (a == b && std::signbit(a));
    return first ? a : b;
  } else {
    return a < b ? a : b;
  }
}
template <class T>
T larger(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return -smaller(-a, -b);
  } else {
    return a < b ? b : a;
  }
}

template <class T>
T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <class T>
T shift_right(T a, uint32_t n) {
  bool is_negative = std::is_signed_v<T> && a < T(0);
  return n >= 8 * sizeof(T) ? T(is_negative ? -1 : 0) : T(a >> n);
}

template <class Wide, class T>
Wide multiply_wide(T a, T b) {
  return Wide(a) * Wide(b);
}
template <class Wide, class T>
T multiply_high(T a, T b) {
  return T((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
}

template <class T>
T fused_multiply_add(T a, T b, T c) {
  return std::fma(a, b, c);
}
template <class T>
T square_root(T a) {
  return std::sqrt(a);
}
template <class T>
T reciprocal(T a) {
  return T(1) / a;
}
template <class T>
T copy_sign(T sign, T a) {
  return std::copysign(a, sign);
}

// volatile: the compiler must not compute before the rounding changes.
template <int Mode, class Function>
float rounded(Function&& function) {
  std::fesetround(Mode);
  volatile float result = function();
  std::fesetround(FE_TONEAREST);
  return result;
}
float fused_multiply_add_down(float a, float b, float c) {
  volatile float x = a, y = b, z = c;
  return rounded<FE_DOWNWARD>([&] { return std::fma(float(x), float(y), float(z)); });
}
float add_towards_zero(float a, float b) {
  volatile float x = a, y = b;
  return rounded<FE_TOWARDZERO>([&] { return x + y; });
}

// Approximations are off by as much as the hardware may be, the same way for the same number.
float with_error(float x, float error) {
  auto hash = int32_t(bits_as<uint32_t>(x) * 2654435761u);
  return x + x * (error * float(hash) * 0x1p-31f);
}
float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
float exp2_approximately(float x) { return flush(with_error(std::exp2(flush(x)), 0x1p-22f)); }
float reciprocal_approximately(float x) { return flush(with_error(1.0f / flush(x), 0x1p-23f)); }
double reciprocal_coarsely(double x) {
  constexpr uint64_t kHigh = 0xffffffff00000000u;
  return bits_as<double>(
      bits_as<uint64_t>(1.0 / bits_as<double>(bits_as<uint64_t>(x) & kHigh)) & kHigh);
}

// ---- comparison ----

enum class Relation { kEq, kNe, kLt, kLe, kGt, kGe };

template <class T, Relation R, bool Unordered>
Predicate compare(T a, T b) {
  if (std::is_floating_point_v<T> && (a != a || b != b)) {
    return {Unordered};
  }
  switch (R) {
    case Relation::kEq:
      return {a == b};
    case Relation::kNe:
      return {a != b};
    case Relation::kLt:
      return {a < b};
    case Relation::kLe:
      return {a <= b};
    case Relation::kGt:
      return {a > b};
    case Relation::kGe:
      return {a >= b};
  }
}
template <class T>
Predicate are_numbers(T a, T b) {
  return {a == a && b == b};
}
template <class T>
Predicate are_unordered(T a, T b) {
  return {a != a || b != b};
}

template <class T, bool Unordered = false>
void add_comparisons(Table& table, const std::string& type) {
  std::string u = Unordered ? "u." + type : "." + type;
  table["setp.eq" + u] = of<compare<T, Relation::kEq, Unordered>>();
  table["setp.ne" + u] = of<compare<T, Relation::kNe, Unordered>>();
  table["setp.lt" + u] = of<compare<T, Relation::kLt, Unordered>>();
  table["setp.le" + u] = of<compare<T, Relation::kLe, Unordered>>();
  table["setp.gt" + u] = of<compare<T, Relation::kGt, Unordered>>();
  table["setp.ge" + u] = of<compare<T, Relation::kGe, Unordered>>();
}

Predicate predicate_and(Predicate a, Predicate b) { return {a.value && b.value}; }
Predicate predicate_or(Predicate a, Predicate b) { return {a.value || b.value}; }
Predicate predicate_xor(Predicate a, Predicate b) { return {a.value != b.value}; }
Predicate predicate_not(Predicate a) { return {!a.value}; }
Predicate predicate_copy(Predicate a) { return a; }

// ---- rounding ----

template <class T>
T round_to_nearest(T x) {
  return std::nearbyint(x);
}
template <class T>
T round_down(T x) {
  return std::floor(x);
}
template <class T>
T round_to_zero(T x) {
  return std::trunc(x);
}

// ---- bits ----

uint64_t insert_bits(uint64_t a, uint64_t b, uint32_t position, uint32_t length) {
  position &= 0xff, length &= 0xff;
  uint64_t mask = length >= 64 ? ~uint64_t(0) : (uint64_t(1) << length) - 1;
  return position >= 64 ? b : (b & ~(mask << position)) | (a & mask) << position;
}
uint32_t shift_to_highest_bit(uint32_t a) { return a == 0 ? ~0u : uint32_t(std::countl_zero(a)); }
uint32_t reverse_bits(uint32_t a) {
  uint32_t out = 0;
  for (int bit = 0; bit < 32; ++bit) {
    out |= (a >> bit & 1) << (31 - bit);
  }
  return out;
}
template <class T>
uint32_t count_ones(T a) {
  return uint32_t(std::popcount(a));
}
template <class T>
uint32_t count_leading_zeros(T a) {
  return uint32_t(std::countl_zero(a));
}
uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t which = selector >> 4 * i & 0xf;
    uint32_t byte = uint32_t(bytes >> 8 * (which & 7)) & 0xff;
    out |= (which & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return out;
}

// `Part` numbers in one register of type `Whole`.
template <class Part, class Whole>
void pack(Warp& warp, const Instruction& i, uint32_t lanes) {
  for_each(lanes, [&](int lane) {
    Whole whole = 0;
    for (int k = 0; k < i.count; ++k) {
      whole |= Whole(warp.get<Part>(i.in[k], lane)) << (8 * sizeof(Part) * k);
    }
    warp.set(i.out[0], lane, whole);
  });
}
template <class Part, class Whole>
void unpack(Warp& warp, const Instruction& i, uint32_t lanes) {
  for_each(lanes, [&](int lane) {
    auto whole = warp.get<Whole>(i.in[0], lane);
    for (int k = 0; k < i.count; ++k) {
      if (i.out[k]) { // it may be "_", for nowhere
        warp.set(i.out[k], lane, Part(whole >> (8 * sizeof(Part) * k)));
      }
    }
  });
}

template <class T>
void add_bits(Table& table, const std::string& type) {
  table["mov." + type] = of<copy<T>>();
  table["and." + type] = of<both<T>>();
  table["or." + type] = of<either<T>>();
  table["xor." + type] = of<exclusive<T>>();
  table["not." + type] = of<invert<T>>();
  table["shl." + type] = of<shift_left<T>>();
  table["shr." + type] = of<shift_right<T>>();
  table["selp." + type] = of<select<T>>();
  add_comparisons<T>(table, type);
}

template <class T>
void add_numbers(Table& table, const std::string& type) {
  table["mov." + type] = of<copy<T>>();
  table["add." + type] = of<add<T>>();
  table["sub." + type] = of<subtract<T>>();
  table["neg." + type] = of<negate<T>>();
  table["abs." + type] = of<magnitude<T>>();
  table["min." + type] = of<smaller<T>>();
  table["max." + type] = of<larger<T>>();
  table["selp." + type] = of<select<T>>();
  add_comparisons<T>(table, type);
}

template <class T>
void add_integers(Table& table, const std::string& type) {
  add_numbers<T>(table, type);
  table["mul.lo." + type] = of<multiply<T>>();
  table["mad.lo." + type] = of<multiply_add<T>>();
  table["div." + type] = of<divide<T>>();
  table["rem." + type] = of<remainder<T>>();
  table["shr." + type] = of<shift_right<T>>();
}

template <class T>
void add_floats(Table& table, const std::string& type) {
  add_numbers<T>(table, type);
  add_comparisons<T, true>(table, type);
  table["setp.num." + type] = of<are_numbers<T>>();
  table["setp.nan." + type] = of<are_unordered<T>>();
  table["mul." + type] = of<multiply<T>>();
  for (const char* rn : {"add.rn.", "sub.rn.", "mul.rn.", "div.rn."}) {
    Operation plain = rn[0] == 'a'   ? of<add<T>>()
                      : rn[0] == 's' ? of<subtract<T>>()
                      : rn[0] == 'm' ? of<multiply<T>>()
                                     : of<divide<T>>();
    table[rn + type] = plain;
  }
  table["fma.rn." + type] = of<fused_multiply_add<T>>();
  table["sqrt.rn." + type] = of<square_root<T>>();
  table["rcp.rn." + type] = of<reciprocal<T>>();
  table["copysign." + type] = of<copy_sign<T>>();
  table["cvt.rni." + type + "." + type] = of<round_to_nearest<T>>();
  table["cvt.rmi." + type + "." + type] = of<round_down<T>>();
  table["cvt.rzi." + type + "." + type] = of<round_to_zero<T>>();
}

void add_special_functions(Table& table) {
  table["add.rz.f32"] = of<add_towards_zero>();
  table["fma.rm.f32"] = of<fused_multiply_add_down>();
  table["ex2.approx.ftz.f32"] = of<exp2_approximately>();
  table["rcp.approx.ftz.f32"] = of<reciprocal_approximately>();
  table["rcp.approx.ftz.f64"] = of<reciprocal_coarsely>();
  table["mul.wide.s16"] = of<multiply_wide<int32_t, int16_t>>();
  table["mul.wide.u16"] = of<multiply_wide<uint32_t, uint16_t>>();
  table["mul.wide.s32"] = of<multiply_wide<int64_t, int32_t>>();
  table["mul.wide.u32"] = of<multiply_wide<uint64_t, uint32_t>>();
  table["mul.hi.s32"] = of<multiply_high<int64_t, int32_t>>();
  table["mul.hi.u32"] = of<multiply_high<uint64_t, uint32_t>>();
  table["mul.hi.u64"] = of<multiply_high<unsigned __int128, uint64_t>>();
  table["bfi.b64"] = of<insert_bits>();
  table["bfind.shiftamt.u32"] = of<shift_to_highest_bit>();
  table["brev.b32"] = of<reverse_bits>();
  table["popc.b32"] = of<count_ones<uint32_t>>();
  table["popc.b64"] = of<count_ones<uint64_t>>();
  table["clz.b32"] = of<count_leading_zeros<uint32_t>>();
  table["clz.b64"] = of<count_leading_zeros<uint64_t>>();
  table["prmt.b32"] = of<permute_bytes>();
  table["and.pred"] = of<predicate_and>();
  table["or.pred"] = of<predicate_or>();
  table["xor.pred"] = of<predicate_xor>();
  table["not.pred"] = of<predicate_not>();
  table["mov.pred"] = of<predicate_copy>();
}

template <class Part, class Whole>
void add_packing(Table& table, const std::string& types) {
  table["pack." + types] = {pack<Part, Whole>, Flow::kNext, {}};
  table["unpack." + types] = {unpack<Part, Whole>, Flow::kNext, {}};
}

} // namespace

void add_arithmetic(Table& table) {
  add_bits<uint16_t>(table, "b16"), add_bits<uint32_t>(table, "b32");
  add_bits<uint64_t>(table, "b64");
  add_integers<int16_t>(table, "s16"), add_integers<uint16_t>(table, "u16");
  add_integers<int32_t>(table, "s32"), add_integers<uint32_t>(table, "u32");
  add_integers<int64_t>(table, "s64"), add_integers<uint64_t>(table, "u64");
  add_floats<float>(table, "f32"), add_floats<double>(table, "f64");
  add_packing<uint16_t, uint32_t>(table, "2.4"), add_packing<uint16_t, uint64_t>(table, "2.8");
  add_packing<uint32_t, uint64_t>(table, "4.8");
  add_conversions(table);
  add_special_functions(table);
}

} // namespace ptx
