// Turns a function of scalars into the handler of an instruction that applies it to each lane.
#pragma once

#include <bit>
#include <type_traits>
#include <utility>

#include "machine.h"
#include "program.h"

namespace ptx {

struct BFloat16 {
  uint16_t bits;
};
// One lane of a predicate register.
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

template <auto Function, class Out, class... In, size_t... I>
Operation make_elementwise(Out (*)(In...), std::index_sequence<I...>) {
  auto run = [](Warp& warp, const Instruction& i, uint32_t lanes) {
    auto apply = [&](int lane) { return Function(read<In>(warp, i.in[I], lane)...); };
    if constexpr (std::is_same_v<Out, Predicate>) {
      uint32_t values = 0;
      for_each(lanes, [&](int lane) { values |= uint32_t(apply(lane).value) << lane; });
      warp.set_predicate(i.out[0], lanes, values);
    } else if (lanes == kAllLanes) { // the common case, which compilers can unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        warp.set<Out>(i.out[0], lane, apply(lane));
      }
    } else {
      for_each(lanes, [&](int lane) { warp.set<Out>(i.out[0], lane, apply(lane)); });
    }
  };
  return {run, Flow::kNext, {kWidth<Out>, kWidth<In>...}};
}
template <auto Function, class Out, class... In>
Operation make_elementwise(Out (*function)(In...)) {
  return make_elementwise<Function>(function, std::index_sequence_for<In...>());
}
// `Function` is a function or a lambda without captures.
template <auto Function>
Operation elementwise() {
  return make_elementwise<Function>(+Function);
}

} // namespace ptx
