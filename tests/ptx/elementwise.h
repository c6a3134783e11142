// From a function of numbers to what an instruction does: the function, for each lane.
#pragma once

#include <bit>
#include <type_traits>
#include <utility>

#include "machine.h"
#include "program.h"

namespace ptx {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return std::bit_cast<To>(from);
}

struct Half {
  _Float16 value;
};
struct BFloat16 {
  uint16_t bits;
};
// A predicate as an input or output of a function of one lane.
struct Predicate {
  bool value;
};

template <class T>
constexpr int kWidth = std::is_same_v<T, Predicate> ? 0
                       : sizeof(T) == 8             ? 8
                                                    : 4;

template <class T>
T read(Warp& warp, Operand operand, int lane) {
  if constexpr (std::is_same_v<T, Predicate>) {
    return {bool(warp.predicate(operand) >> lane & 1)};
  } else {
    return warp.get<T>(operand, lane);
  }
}

template <auto Function, class Out, class... In>
struct Elementwise {
  template <size_t... I>
  static void run(Warp& warp, const Instruction& i, uint32_t lanes, std::index_sequence<I...>) {
    if constexpr (std::is_same_v<Out, Predicate>) {
      uint32_t values = 0;
      for_each(lanes, [&](int lane) {
        values |= uint32_t(Function(read<In>(warp, i.in[I], lane)...).value) << lane;
      });
      warp.set_predicate(i.out[0], lanes, values);
    } else if (lanes == kAllLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        warp.set<Out>(i.out[0], lane, Function(read<In>(warp, i.in[I], lane)...));
      }
    } else {
      for_each(lanes, [&](int lane) {
        warp.set<Out>(i.out[0], lane, Function(read<In>(warp, i.in[I], lane)...));
      });
    }
  }
  static void handle(Warp& warp, const Instruction& i, uint32_t lanes) {
    run(warp, i, lanes, std::index_sequence_for<In...>{});
  }
};

template <auto Function, class Out, class... In>
Operation wrap(Out (*)(In...)) {
  return {Elementwise<Function, Out, In...>::handle, Flow::kNext, {kWidth<Out>, kWidth<In>...}};
}
template <auto Function>
Operation of() {
  return wrap<Function>(Function);
}

} // namespace ptx
