// Memory accesses, collective instructions of warps and blocks, and the table of all instructions.

#include <functional>
#include <initializer_list>
#include <string>

#include "machine.h"
#include "program.h"

namespace ptx {
namespace {

// ---- memory ----

uint64_t address_of(Warp& warp, const Instruction& i, int lane) {
  uint64_t base =
      i.has_wide_address ? warp.get<uint64_t>(i.in[0], lane) : warp.get<uint32_t>(i.in[0], lane);
  return base + uint64_t(i.displacement);
}

// Checks an access and returns its host address.
template <class T>
char* checked_address(Warp& warp, const Instruction& i, int lane, Memory::Access& access) {
  access.address = address_of(warp, i, lane);
  access.bytes = sizeof(T) * i.count;
  return i.space == Space::kParameters ? machine.parameter(access.address, access.bytes)
                                       : machine.memory.access(warp, i, lane, access);
}

void finish_access(Warp& warp, const Instruction& i) {
  if (i.space != Space::kParameters) {
    ++warp.counts[i.space == Space::kShared ? kSharedAccesses : kGlobalAccesses];
    machine.memory.tick();
  }
}

// Sign-extends signed and zero-extends unsigned types to the width of the register.
template <class T, class Register>
void load(Warp& warp, const Instruction& i, uint32_t lanes) {
  for_each(lanes, [&](int lane) {
    Memory::Access access{.reads = true};
    const char* from = checked_address<T>(warp, i, lane, access);
    for (int k = 0; k < i.count; ++k) {
      constexpr uint32_t kBytes = (1u << sizeof(T)) - 1;
      if (access.uninitialized & kBytes << k * sizeof(T)) {
        warp.mark_uninitialized(i.out[k], lane);
      }
      T value;
      std::memcpy(&value, from + k * sizeof(T), sizeof value);
      warp.set(i.out[k], lane, Register(value));
    }
  });
  finish_access(warp, i);
}
template <class T, class Register>
void store(Warp& warp, const Instruction& i, uint32_t lanes) {
  for_each(lanes, [&](int lane) {
    Memory::Access access{.writes = true};
    char* to = checked_address<T>(warp, i, lane, access);
    for (int k = 0; k < i.count; ++k) {
      T value = T(warp.get<Register>(i.in[1 + k], lane));
      std::memcpy(to + k * sizeof(T), &value, sizeof value);
    }
  });
  finish_access(warp, i);
}
template <class T, class Function>
void atomic(Warp& warp, const Instruction& i, uint32_t lanes) {
  for_each(lanes, [&](int lane) {
    Memory::Access access{.reads = true, .writes = true};
    char* at = checked_address<T>(warp, i, lane, access);
    if (access.uninitialized != 0) {
      throw Fault("atomic operation on uninitialized memory", lane);
    }
    T before;
    std::memcpy(&before, at, sizeof before);
    T after = Function()(before, warp.get<T>(i.in[1], lane));
    std::memcpy(at, &after, sizeof after);
    if (i.out[0]) {
      warp.set(i.out[0], lane, before);
    }
  });
  ++warp.counts[kAtomics];
  machine.memory.tick();
}

void fence(Warp& warp, const Instruction&, uint32_t lanes) {
  machine.memory.fence(warp, lanes);
  machine.memory.tick();
}
void do_nothing(Warp&, const Instruction&, uint32_t) {}

void shared_to_generic(Warp& warp, const Instruction& i, uint32_t lanes) {
  auto base = reinterpret_cast<uint64_t>(warp.block->shared.data());
  for_each(
      lanes, [&](int lane) { warp.set(i.out[0], lane, base + warp.get<uint64_t>(i.in[0], lane)); });
}

// ---- collectives of a warp ----

void sync_warp(Warp& warp, const Instruction&, uint32_t lanes) {
  uint64_t now = machine.memory.tick();
  if (lanes == warp.live) {
    warp.last_sync = now;
    return;
  }
  warp.pair_syncs.resize(kLanes);
  for_each(lanes, [&](int lane) {
    for_each(lanes, [&](int other) { warp.pair_syncs[lane][other] = now; });
  });
}

void ballot(Warp& warp, const Instruction& i, uint32_t lanes) {
  uint32_t votes = warp.predicate(i.in[0]) & lanes;
  for_each(lanes, [&](int lane) { warp.set(i.out[0], lane, votes); });
}
void vote_all(Warp& warp, const Instruction& i, uint32_t lanes) {
  bool all = (warp.predicate(i.in[0]) & lanes) == lanes;
  warp.set_predicate(i.out[0], lanes, all ? kAllLanes : 0);
}
void vote_any(Warp& warp, const Instruction& i, uint32_t lanes) {
  warp.set_predicate(i.out[0], lanes, warp.predicate(i.in[0]) & lanes ? kAllLanes : 0);
}

// Computes the source lane of a shuffle, and returns whether it is in the segment (PTX ISA,
// shfl.sync).
using FindSource = bool (*)(int lane, int b, int segment, int limit, int* source);
template <class Source, class Compare>
bool find_source(int lane, int b, int segment, int limit, int* source) {
  *source = Source()(lane, b);
  return Compare()(*source, (lane & segment) | (limit & ~segment));
}
bool find_index(int lane, int b, int segment, int limit, int* source) {
  *source = (lane & segment) | (b & ~segment);
  return *source <= ((lane & segment) | (limit & ~segment));
}

template <FindSource Find>
void shuffle(Warp& warp, const Instruction& i, uint32_t lanes) {
  uint32_t values[kLanes], inside = 0;
  for_each(lanes, [&](int lane) { values[lane] = warp.get<uint32_t>(i.in[0], lane); });
  uint32_t out[kLanes];
  for_each(lanes, [&](int lane) {
    auto c = warp.get<uint32_t>(i.in[2], lane);
    int source;
    bool found = Find(
        lane, int(warp.get<uint32_t>(i.in[1], lane) & 31), int(c >> 8 & 31), int(c & 31), &source);
    source = found ? source : lane;
    if (!(lanes >> source & 1)) {
      throw Fault("shuffle reads a lane outside the mask", lane);
    }
    out[lane] = values[source];
    inside |= uint32_t(found) << lane;
  });
  for_each(lanes, [&](int lane) { warp.set(i.out[0], lane, out[lane]); });
  if (i.out[1]) {
    warp.set_predicate(i.out[1], lanes, inside);
  }
}

template <class T, class Function>
void reduce(Warp& warp, const Instruction& i, uint32_t lanes) {
  T result = warp.get<T>(i.in[0], std::countr_zero(lanes));
  for_each(lanes & (lanes - 1), [&](int lane) {
    result = Function()(result, warp.get<T>(i.in[0], lane));
  });
  for_each(lanes, [&](int lane) { warp.set(i.out[0], lane, result); });
}

// ---- collectives of a block ----

void barrier_count(Warp& warp, const Instruction& i, uint32_t lanes) {
  for_each(lanes, [&](int lane) { warp.set(i.out[0], lane, uint32_t(warp.block->votes)); });
}
void barrier_any(Warp& warp, const Instruction& i, uint32_t lanes) {
  warp.set_predicate(i.out[0], lanes, warp.block->votes > 0 ? kAllLanes : 0);
}
void barrier_all(Warp& warp, const Instruction& i, uint32_t lanes) {
  bool all = warp.block->votes == warp.block->live;
  warp.set_predicate(i.out[0], lanes, all ? kAllLanes : 0);
}

// ---- errors ----

[[noreturn]] void fail_assertion(Warp& warp, const Instruction& i, uint32_t lanes) {
  int lane = std::countr_zero(lanes);
  auto message = reinterpret_cast<const char*>(warp.get<uint64_t>(i.in[0], lane));
  throw Fault(message, lane, /*is_assertion=*/true);
}
[[noreturn]] void trap(Warp&, const Instruction&, uint32_t lanes) {
  throw Fault("trap", std::countr_zero(lanes));
}

// ---- table ----

// Keys contain the type and the width of the register, for example "ld.s16.4".
template <class T, class Register>
void add_accesses(Table& table, std::initializer_list<const char*> types) {
  for (const char* type : types) {
    std::string key = std::string(type) + "." + std::to_string(sizeof(Register));
    table["ld." + key] = {load<T, Register>, Flow::kNext, {}};
    table["st." + key] = {store<T, Register>, Flow::kNext, {}};
  }
}
template <class Register>
void add_narrow_accesses(Table& table) {
  add_accesses<int8_t, Register>(table, {"s8"});
  add_accesses<uint8_t, Register>(table, {"b8", "u8"});
  add_accesses<int16_t, Register>(table, {"s16"});
  add_accesses<uint16_t, Register>(table, {"b16", "u16"});
  add_accesses<int32_t, Register>(table, {"s32"});
  add_accesses<uint32_t, Register>(table, {"b32", "u32", "f32"});
}

template <class T>
struct Min {
  T operator()(T a, T b) { return a < b ? a : b; }
};
template <class T>
struct Max {
  T operator()(T a, T b) { return a < b ? b : a; }
};
template <class T>
struct Exchange {
  T operator()(T, T b) { return b; }
};

template <class T>
void add_reductions(Table& table, const std::string& type) {
  table["atom.add." + type] = {atomic<T, std::plus<T>>, Flow::kNext, {}};
  table["atom.min." + type] = {atomic<T, Min<T>>, Flow::kNext, {}};
  table["atom.max." + type] = {atomic<T, Max<T>>, Flow::kNext, {}};
  table["redux.sync.add." + type] = {reduce<T, std::plus<T>>, Flow::kWarpSync, {4, 4}};
  table["redux.sync.min." + type] = {reduce<T, Min<T>>, Flow::kWarpSync, {4, 4}};
  table["redux.sync.max." + type] = {reduce<T, Max<T>>, Flow::kWarpSync, {4, 4}};
}
template <class T>
void add_bitwise_reductions(Table& table, const std::string& type) {
  table["atom.and." + type] = {atomic<T, std::bit_and<T>>, Flow::kNext, {}};
  table["atom.or." + type] = {atomic<T, std::bit_or<T>>, Flow::kNext, {}};
  table["atom.exch." + type] = {atomic<T, Exchange<T>>, Flow::kNext, {}};
  table["redux.sync.or." + type] = {reduce<T, std::bit_or<T>>, Flow::kWarpSync, {4, 4}};
}

void add_control(Table& table) {
  table["ret"] = table["exit"] = {do_nothing, Flow::kExit, {}};
  table["cvta.shared.u64"] = {shared_to_generic, Flow::kNext, {8, 8}};
  table["trap"] = {trap, Flow::kNext, {}};
  table["bar.sync"] = table["barrier.sync"] = {nullptr, Flow::kBarrier, {}};
  table["bar.red.popc.u32"] = {barrier_count, Flow::kBarrier, {4, 0}};
  table["bar.red.or.pred"] = {barrier_any, Flow::kBarrier, {0, 0}};
  table["bar.red.and.pred"] = {barrier_all, Flow::kBarrier, {0, 0}};
  table["bar.warp.sync"] = {sync_warp, Flow::kWarpSync, {}};
  table["vote.sync.ballot.b32"] = {ballot, Flow::kWarpSync, {4, 0}};
  table["vote.sync.all.pred"] = {vote_all, Flow::kWarpSync, {0, 0}};
  table["vote.sync.any.pred"] = {vote_any, Flow::kWarpSync, {0, 0}};
  table["shfl.sync.up.b32"] = {
      shuffle<find_source<std::minus<>, std::greater_equal<>>>, Flow::kWarpSync, {4, 4, 4, 4}};
  table["shfl.sync.down.b32"] = {
      shuffle<find_source<std::plus<>, std::less_equal<>>>, Flow::kWarpSync, {4, 4, 4, 4}};
  table["shfl.sync.bfly.b32"] = {
      shuffle<find_source<std::bit_xor<>, std::less_equal<>>>, Flow::kWarpSync, {4, 4, 4, 4}};
  table["shfl.sync.idx.b32"] = {shuffle<find_index>, Flow::kWarpSync, {4, 4, 4, 4}};
  for (const char* name :
       {"membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.acq_rel.sys", "fence.sc.gpu",
        "fence.sc.sys"}) {
    table[name] = {fence, Flow::kNext, {}};
  }
  // Hints, and fences within a block, which no kernel here relies on.
  for (const char* name :
       {"membar.cta", "fence.acq_rel.cta", "fence.sc.cta", "nanosleep.u32", "griddepcontrol.wait",
        "griddepcontrol.launch_dependents"}) {
    table[name] = {do_nothing, Flow::kNext, {}};
  }
}

Table make_table() {
  Table table;
  add_arithmetic(table);
  add_conversions(table);
  add_narrow_accesses<uint32_t>(table), add_narrow_accesses<uint64_t>(table);
  add_accesses<uint64_t, uint64_t>(table, {"b64", "u64", "s64", "f64"});
  add_reductions<int32_t>(table, "s32"), add_reductions<uint32_t>(table, "u32");
  add_reductions<int64_t>(table, "s64"), add_reductions<uint64_t>(table, "u64");
  add_bitwise_reductions<uint32_t>(table, "b32"), add_bitwise_reductions<uint64_t>(table, "b64");
  table["call.__assertfail"] = {fail_assertion, Flow::kNext, {}};
  add_control(table);
  return table;
}

} // namespace

const Operation* find_operation(const std::string& opcode) {
  static const Table table = make_table();
  auto found = table.find(opcode);
  return found == table.end() ? nullptr : &found->second;
}

} // namespace ptx
