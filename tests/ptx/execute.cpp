// Instructions that access memory, and those that the threads of a warp or a block execute together.

#include <string>
#include <type_traits>

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

// Where an access goes, once it is found to be right.
template <class T>
char* locate(Warp& warp, const Instruction& i, int lane, Memory::Access& access) {
  access.address = address_of(warp, i, lane);
  access.bytes = sizeof(T) * i.count;
  return i.space == Space::kParameters ? machine.parameter(access.address, access.bytes)
                                       : machine.memory.access(warp, i, lane, access);
}

void count_access(Warp& warp, const Instruction& i) {
  if (i.space != Space::kParameters) {
    ++(i.space == Space::kShared ? warp.counts.shared_accesses : warp.counts.global_accesses);
    machine.memory.take_time();
  }
}

// Numbers narrower than the register are extended, by their sign if they have one.
template <class T, class Register>
void load(Warp& warp, const Instruction& i, uint32_t lanes) {
  for_each(lanes, [&](int lane) {
    Memory::Access access{.reads = true};
    const char* from = locate<T>(warp, i, lane, access);
    for (int k = 0; k < i.count; ++k) {
      constexpr uint32_t kBytes = (1u << sizeof(T)) - 1;
      if (access.undefined & kBytes << k * sizeof(T)) {
        warp.mark_undefined(i.out[k], lane);
      }
      T value;
      std::memcpy(&value, from + k * sizeof(T), sizeof value);
      warp.set(i.out[k], lane, Register(value));
    }
  });
  count_access(warp, i);
}
template <class T, class Register>
void store(Warp& warp, const Instruction& i, uint32_t lanes) {
  for_each(lanes, [&](int lane) {
    Memory::Access access{.writes = true};
    char* to = locate<T>(warp, i, lane, access);
    for (int k = 0; k < i.count; ++k) {
      T value = T(warp.get<Register>(i.in[1 + k], lane));
      std::memcpy(to + k * sizeof(T), &value, sizeof value);
    }
  });
  count_access(warp, i);
}
template <class T, auto Function>
void atomic(Warp& warp, const Instruction& i, uint32_t lanes) {
  for_each(lanes, [&](int lane) {
    Memory::Access access{.reads = true, .writes = true};
    char* at = locate<T>(warp, i, lane, access);
    if (access.undefined != 0) {
      throw Fault("changes what was never written", lane);
    }
    T before;
    std::memcpy(&before, at, sizeof before);
    T after = Function(before, warp.get<T>(i.in[1], lane));
    std::memcpy(at, &after, sizeof after);
    if (i.out[0]) {
      warp.set(i.out[0], lane, before);
    }
  });
  ++warp.counts.atomics;
  machine.memory.take_time();
}

void fence(Warp& warp, const Instruction&, uint32_t lanes) {
  machine.memory.fence(warp, lanes);
  machine.memory.take_time();
}
void do_nothing(Warp&, const Instruction&, uint32_t) {}

void shared_to_generic(Warp& warp, const Instruction& i, uint32_t lanes) {
  auto base = reinterpret_cast<uint64_t>(warp.block->shared.data());
  for_each(
      lanes, [&](int lane) { warp.set(i.out[0], lane, base + warp.get<uint64_t>(i.in[0], lane)); });
}

// ---- what the lanes of a warp, and the threads of a block, do together ----

void meet_warp(Warp& warp, const Instruction&, uint32_t lanes) {
  uint64_t now = machine.memory.take_time();
  if (lanes == warp.live) {
    warp.last_meeting = now;
    return;
  }
  warp.partial_meetings.resize(kLanes);
  for_each(lanes, [&](int lane) {
    for_each(lanes, [&](int other) { warp.partial_meetings[lane][other] = now; });
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

// The source of a lane, and whether it lies in the segment (PTX ISA, shfl.sync).
using FindSource = bool (*)(int lane, int b, int segment, int limit, int* source);
bool from_below(int lane, int b, int segment, int limit, int* source) {
  *source = lane - b;
  return *source >= ((lane & segment) | (limit & ~segment));
}
bool from_above(int lane, int b, int segment, int limit, int* source) {
  *source = lane + b;
  return *source <= ((lane & segment) | (limit & ~segment));
}
bool from_other(int lane, int b, int segment, int limit, int* source) {
  *source = lane ^ b;
  return *source <= ((lane & segment) | (limit & ~segment));
}
bool from_index(int lane, int b, int segment, int limit, int* source) {
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
      throw Fault("takes the value of a lane outside the mask", lane);
    }
    out[lane] = values[source];
    inside |= uint32_t(found) << lane;
  });
  for_each(lanes, [&](int lane) { warp.set(i.out[0], lane, out[lane]); });
  if (i.out[1]) {
    warp.set_predicate(i.out[1], lanes, inside);
  }
}

template <class T, auto Function>
void reduce(Warp& warp, const Instruction& i, uint32_t lanes) {
  T result = warp.get<T>(i.in[0], std::countr_zero(lanes));
  for_each(lanes & (lanes - 1), [&](int lane) {
    result = Function(result, warp.get<T>(i.in[0], lane));
  });
  for_each(lanes, [&](int lane) { warp.set(i.out[0], lane, result); });
}

void receive_count(Warp& warp, const Instruction& i, uint32_t lanes) {
  for_each(lanes, [&](int lane) { warp.set(i.out[0], lane, uint32_t(warp.block->votes)); });
}
void receive_any(Warp& warp, const Instruction& i, uint32_t lanes) {
  warp.set_predicate(i.out[0], lanes, warp.block->votes > 0 ? kAllLanes : 0);
}
void receive_all(Warp& warp, const Instruction& i, uint32_t lanes) {
  bool all = warp.block->votes == warp.block->live;
  warp.set_predicate(i.out[0], lanes, all ? kAllLanes : 0);
}

[[noreturn]] void fail_assertion(Warp& warp, const Instruction& i, uint32_t lanes) {
  int lane = std::countr_zero(lanes);
  auto message = reinterpret_cast<const char*>(warp.get<uint64_t>(i.in[0], lane));
  throw Fault(message, lane, /*is_assertion=*/true);
}
[[noreturn]] void trap(Warp&, const Instruction&, uint32_t lanes) {
  throw Fault("trap", std::countr_zero(lanes));
}

// ---- the table ----

// By type and by the width of the register: "ld.s16.4".
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
T sum(T a, T b) {
  return T(a + b);
}
template <class T>
T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T either(T a, T b) {
  return a | b;
}
template <class T>
T both(T a, T b) {
  return a & b;
}
template <class T>
T second(T, T b) {
  return b;
}

template <class T>
void add_reductions(Table& table, const std::string& type) {
  table["atom.add." + type] = {atomic<T, sum<T>>, Flow::kNext, {}};
  table["atom.min." + type] = {atomic<T, smaller<T>>, Flow::kNext, {}};
  table["atom.max." + type] = {atomic<T, larger<T>>, Flow::kNext, {}};
  table["redux.sync.add." + type] = {reduce<T, sum<T>>, Flow::kMeeting, {4, 4}};
  table["redux.sync.min." + type] = {reduce<T, smaller<T>>, Flow::kMeeting, {4, 4}};
  table["redux.sync.max." + type] = {reduce<T, larger<T>>, Flow::kMeeting, {4, 4}};
}
template <class T>
void add_bitwise_reductions(Table& table, const std::string& type) {
  table["atom.and." + type] = {atomic<T, both<T>>, Flow::kNext, {}};
  table["atom.or." + type] = {atomic<T, either<T>>, Flow::kNext, {}};
  table["atom.exch." + type] = {atomic<T, second<T>>, Flow::kNext, {}};
  table["redux.sync.or." + type] = {reduce<T, either<T>>, Flow::kMeeting, {4, 4}};
}

void add_control(Table& table) {
  table["ret"] = table["exit"] = {do_nothing, Flow::kExit, {}};
  table["cvta.shared.u64"] = {shared_to_generic, Flow::kNext, {8, 8}};
  table["trap"] = {trap, Flow::kNext, {}};
  table["bar.sync"] = table["barrier.sync"] = {nullptr, Flow::kBarrier, {}};
  table["bar.red.popc.u32"] = {receive_count, Flow::kBarrier, {4, 0}};
  table["bar.red.or.pred"] = {receive_any, Flow::kBarrier, {0, 0}};
  table["bar.red.and.pred"] = {receive_all, Flow::kBarrier, {0, 0}};
  table["bar.warp.sync"] = {meet_warp, Flow::kMeeting, {}};
  table["vote.sync.ballot.b32"] = {ballot, Flow::kMeeting, {4, 0}};
  table["vote.sync.all.pred"] = {vote_all, Flow::kMeeting, {0, 0}};
  table["vote.sync.any.pred"] = {vote_any, Flow::kMeeting, {0, 0}};
  table["shfl.sync.up.b32"] = {shuffle<from_below>, Flow::kMeeting, {4, 4, 4, 4}};
  table["shfl.sync.down.b32"] = {shuffle<from_above>, Flow::kMeeting, {4, 4, 4, 4}};
  table["shfl.sync.bfly.b32"] = {shuffle<from_other>, Flow::kMeeting, {4, 4, 4, 4}};
  table["shfl.sync.idx.b32"] = {shuffle<from_index>, Flow::kMeeting, {4, 4, 4, 4}};
  for (const char* name :
       {"membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.acq_rel.sys", "fence.sc.gpu",
        "fence.sc.sys"}) {
    table[name] = {fence, Flow::kNext, {}};
  }
  // Order within a block only, for which no kernel here relies on fences; and hints.
  for (const char* name :
       {"membar.cta", "fence.acq_rel.cta", "fence.sc.cta", "nanosleep.u32", "griddepcontrol.wait",
        "griddepcontrol.launch_dependents"}) {
    table[name] = {do_nothing, Flow::kNext, {}};
  }
}

Table make_table() {
  Table table;
  add_arithmetic(table);
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
