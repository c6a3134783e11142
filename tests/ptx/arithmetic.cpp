// Arithmetic, logic and comparison instructions. Only those that nvcc has emitted for our kernels
// are implemented; the decoder rejects all others.

#include <cfenv>
#include <cmath>
#include <functional>
#include <string>

#include "elementwise.h"

namespace ptx {
namespace {

// ---- arithmetic ----

template <class T>
T copy(T a) {
  return a;
}
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
T divide(T a, T b) {
  return std::is_integral_v<T> && b == 0 ? T(-1) : T(a / b);
}
template <class T>
T select(T a, T b, Predicate p) {
  return p.value ? a : b;
}

template <class T>
T absolute(T a) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::fabs(a);
  } else {
    return a < 0 ? T(-a) : a;
  }
}

// If one operand is NaN, returns the other; -0 is less than +0. std::fmin leaves zeros unspecified.
template <class T>
T minimum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    bool first = a < b || b != b || (a == b && std::signbit(a));
    return first ? a : b;
  } else {
    return a < b ? a : b;
  }
}
template <class T>
T maximum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return -minimum(-a, -b);
  } else {
    return a < b ? b : a;
  }
}

// Unlike in C++, shifts may exceed the width of the type.
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

// volatile keeps the compiler from moving the operation out of the changed rounding mode.
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

// Approximate instructions have up to the error that PTX allows, as a function of the operand.
float with_error(float x, float error) {
  auto hash = int32_t(std::bit_cast<uint32_t>(x) * 2654435761u);
  return x + x * (error * float(hash) * 0x1p-31f);
}
float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
float exp2_approx(float x) { return flush(with_error(std::exp2(flush(x)), 0x1p-22f)); }
float reciprocal_approx(float x) { return flush(with_error(1.0f / flush(x), 0x1p-23f)); }
double reciprocal_approx_double(double x) { // only uses and returns the upper 32 bits
  constexpr uint64_t kHigh = 0xffffffff00000000u;
  auto truncate = [](double y) {
    return std::bit_cast<double>(std::bit_cast<uint64_t>(y) & kHigh);
  };
  return truncate(1.0 / truncate(x));
}

// ---- comparison ----

template <class T, class Relation, bool Unordered>
Predicate compare(T a, T b) {
  bool is_nan = std::is_floating_point_v<T> && (a != a || b != b);
  return {is_nan ? Unordered : Relation()(a, b)};
}

template <class T, bool Unordered = false>
void add_comparisons(Table& table, const std::string& type) {
  std::string u = Unordered ? "u." + type : "." + type;
  table["setp.eq" + u] = elementwise<compare<T, std::equal_to<T>, Unordered>>();
  table["setp.ne" + u] = elementwise<compare<T, std::not_equal_to<T>, Unordered>>();
  table["setp.lt" + u] = elementwise<compare<T, std::less<T>, Unordered>>();
  table["setp.le" + u] = elementwise<compare<T, std::less_equal<T>, Unordered>>();
  table["setp.gt" + u] = elementwise<compare<T, std::greater<T>, Unordered>>();
  table["setp.ge" + u] = elementwise<compare<T, std::greater_equal<T>, Unordered>>();
}

// ---- bits ----

uint64_t insert_bits(uint64_t a, uint64_t b, uint32_t position, uint32_t length) {
  position &= 0xff, length &= 0xff;
  uint64_t mask = length >= 64 ? ~uint64_t(0) : (uint64_t(1) << length) - 1;
  return position >= 64 ? b : (b & ~(mask << position)) | (a & mask) << position;
}
uint32_t reverse_bits(uint32_t a) {
  uint32_t out = 0;
  for (int bit = 0; bit < 32; ++bit) {
    out |= (a >> bit & 1) << (31 - bit);
  }
  return out;
}
uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t which = selector >> 4 * i & 0xf;
    uint32_t byte = uint32_t(bytes >> 8 * (which & 7)) & 0xff;
    out |= (which & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i; // bit 3 replicates the sign
  }
  return out;
}

// Moves between a register of type `Whole` and a vector of `Part`s.
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
      if (i.out[k]) { // not "_"
        warp.set(i.out[k], lane, Part(whole >> (8 * sizeof(Part) * k)));
      }
    }
  });
}

// ---- table ----

template <class T>
void add_bits(Table& table, const std::string& type) {
  table["mov." + type] = elementwise<copy<T>>();
  table["and." + type] = elementwise<[](T a, T b) { return T(a & b); }>();
  table["or." + type] = elementwise<[](T a, T b) { return T(a | b); }>();
  table["xor." + type] = elementwise<[](T a, T b) { return T(a ^ b); }>();
  table["not." + type] = elementwise<[](T a) { return T(~a); }>();
  table["shl." + type] = elementwise<shift_left<T>>();
  table["shr." + type] = elementwise<shift_right<T>>();
  table["selp." + type] = elementwise<select<T>>();
  add_comparisons<T>(table, type);
}

template <class T>
void add_numbers(Table& table, const std::string& type) {
  table["mov." + type] = elementwise<copy<T>>();
  table["add." + type] = elementwise<add<T>>();
  table["sub." + type] = elementwise<subtract<T>>();
  table["neg." + type] = elementwise<[](T a) { return T(-a); }>();
  table["abs." + type] = elementwise<absolute<T>>();
  table["min." + type] = elementwise<minimum<T>>();
  table["max." + type] = elementwise<maximum<T>>();
  table["selp." + type] = elementwise<select<T>>();
  add_comparisons<T>(table, type);
}

template <class T>
void add_integers(Table& table, const std::string& type) {
  add_numbers<T>(table, type);
  table["mul.lo." + type] = elementwise<multiply<T>>();
  table["mad.lo." + type] = elementwise<[](T a, T b, T c) { return T(a * b + c); }>();
  table["div." + type] = elementwise<divide<T>>();
  table["rem." + type] = elementwise<[](T a, T b) { return b == 0 ? a : T(a % b); }>();
  table["shr." + type] = elementwise<shift_right<T>>();
}

template <class T>
void add_floats(Table& table, const std::string& type) {
  add_numbers<T>(table, type);
  add_comparisons<T, true>(table, type);
  table["setp.num." + type] = elementwise<[](T a, T b) { return Predicate{a == a && b == b}; }>();
  table["setp.nan." + type] = elementwise<[](T a, T b) { return Predicate{a != a || b != b}; }>();
  table["add.rn." + type] = elementwise<add<T>>();
  table["sub.rn." + type] = elementwise<subtract<T>>();
  table["mul." + type] = table["mul.rn." + type] = elementwise<multiply<T>>();
  table["div.rn." + type] = elementwise<divide<T>>();
  table["fma.rn." + type] = elementwise<[](T a, T b, T c) { return std::fma(a, b, c); }>();
  table["sqrt.rn." + type] = elementwise<[](T a) { return std::sqrt(a); }>();
  table["rcp.rn." + type] = elementwise<[](T a) { return T(1) / a; }>();
  table["copysign." + type] = elementwise<[](T sign, T a) { return std::copysign(a, sign); }>();
  table["cvt.rni." + type + "." + type] = elementwise<[](T a) { return std::nearbyint(a); }>();
  table["cvt.rmi." + type + "." + type] = elementwise<[](T a) { return std::floor(a); }>();
  table["cvt.rzi." + type + "." + type] = elementwise<[](T a) { return std::trunc(a); }>();
}

void add_special_functions(Table& table) {
  table["add.rz.f32"] = elementwise<add_towards_zero>();
  table["fma.rm.f32"] = elementwise<fused_multiply_add_down>();
  table["ex2.approx.ftz.f32"] = elementwise<exp2_approx>();
  table["rcp.approx.ftz.f32"] = elementwise<reciprocal_approx>();
  table["rcp.approx.ftz.f64"] = elementwise<reciprocal_approx_double>();
  table["mul.wide.s16"] = elementwise<multiply_wide<int32_t, int16_t>>();
  table["mul.wide.u16"] = elementwise<multiply_wide<uint32_t, uint16_t>>();
  table["mul.wide.s32"] = elementwise<multiply_wide<int64_t, int32_t>>();
  table["mul.wide.u32"] = elementwise<multiply_wide<uint64_t, uint32_t>>();
  table["mul.hi.s32"] = elementwise<multiply_high<int64_t, int32_t>>();
  table["mul.hi.u32"] = elementwise<multiply_high<uint64_t, uint32_t>>();
  table["mul.hi.u64"] = elementwise<multiply_high<unsigned __int128, uint64_t>>();
  table["bfi.b64"] = elementwise<insert_bits>();
  table["bfind.shiftamt.u32"] =
      elementwise<[](uint32_t a) { return a == 0 ? ~0u : uint32_t(std::countl_zero(a)); }>();
  table["brev.b32"] = elementwise<reverse_bits>();
  table["popc.b32"] = elementwise<[](uint32_t a) { return uint32_t(std::popcount(a)); }>();
  table["popc.b64"] = elementwise<[](uint64_t a) { return uint32_t(std::popcount(a)); }>();
  table["clz.b32"] = elementwise<[](uint32_t a) { return uint32_t(std::countl_zero(a)); }>();
  table["clz.b64"] = elementwise<[](uint64_t a) { return uint32_t(std::countl_zero(a)); }>();
  table["prmt.b32"] = elementwise<permute_bytes>();
  using P = Predicate;
  table["and.pred"] = elementwise<[](P a, P b) { return P{a.value && b.value}; }>();
  table["or.pred"] = elementwise<[](P a, P b) { return P{a.value || b.value}; }>();
  table["xor.pred"] = elementwise<[](P a, P b) { return P{a.value != b.value}; }>();
  table["not.pred"] = elementwise<[](P a) { return P{!a.value}; }>();
  table["mov.pred"] = elementwise<copy<P>>();
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
  add_special_functions(table);
}

} // namespace ptx
