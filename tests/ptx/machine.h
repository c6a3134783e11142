// A machine that runs kernels: every thread has a program counter of its own, several blocks are
// resident at once, and who goes on is drawn by lot.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "memory.h"
#include "program.h"

namespace ptx {

// What the threads of a warp have done; an instruction counts once for all lanes that execute it
// together.
struct Counts {
  uint64_t instructions = 0, global_accesses = 0, shared_accesses = 0, atomics = 0, barriers = 0;

  void add(const Counts& other);
  void raise(const Counts& other); // to the larger number each
};

struct Warp {
  Block* block = nullptr;
  int first_thread = 0; // in the block
  uint32_t live = 0;    // lanes that have not exited
  uint32_t ready = 0;   // of them, those that wait for nothing
  uint32_t at_barrier = 0, at_meeting = 0;
  std::array<int, kLanes> pc{};
  std::vector<char> registers;
  const char* constants = nullptr;
  // When lanes of the warp have met last, all of them or each pair.
  uint64_t last_meeting = 0;
  std::vector<std::array<uint64_t, kLanes>> partial_meetings;
  Counts counts;
  // By register: lanes whose value was read from memory that nobody had written. Such a value may be
  // copied, for a vector may have gaps, but not used. Empty while there are none.
  std::vector<uint32_t> undefined;

  void mark_undefined(Operand operand, int lane);
  // Before an instruction uses these registers.
  void check_defined(const Instruction& instruction, uint32_t lanes);

  template <class T>
  char* at(Operand operand) {
    if (operand.is_constant) {
      size_t wide = sizeof(T) == 8 ? 4 * kLanes : 0; // constants are there in both widths
      return const_cast<char*>(constants) + operand.offset + wide;
    }
    return registers.data() + operand.offset;
  }
  template <class T>
  static constexpr size_t kStride = sizeof(T) == 8 ? 8 : 4;

  template <class T>
  T get(Operand operand, int lane) {
    T value;
    std::memcpy(&value, at<T>(operand) + lane * kStride<T>, sizeof value);
    return value;
  }
  template <class T>
  void set(Operand operand, int lane, T value) {
    if constexpr (sizeof(T) < 4) {
      set(operand, lane, uint32_t(0)); // what is above a narrow number is zero
    }
    std::memcpy(at<T>(operand) + lane * kStride<T>, &value, sizeof value);
  }
  uint32_t predicate(Operand operand) { return get<uint32_t>(operand, 0); }
  void set_predicate(Operand operand, uint32_t lanes, uint32_t values) {
    set(operand, 0, (predicate(operand) & ~lanes) | (values & lanes));
  }
  uint64_t met(int lane, int other) const {
    return partial_meetings.empty() ? last_meeting
                                    : std::max(last_meeting, partial_meetings[lane][other]);
  }
};

struct Block {
  uint32_t index = 0;
  std::vector<Warp> warps;
  std::vector<char> shared;
  std::vector<Cell> shared_cells;
  int live = 0, at_barrier = 0; // threads
  int votes = 0;                // at the barrier
  uint64_t last_barrier = 0;
};

// Calls function(lane) for each lane of a set.
template <class Function>
inline void for_each(uint32_t lanes, Function&& function) {
  for (; lanes != 0; lanes &= lanes - 1) {
    function(std::countr_zero(lanes));
  }
}

class Machine {
 public:
  Memory memory;

  // 0: blocks one after the other, lanes of a warp together wherever they can be. Other numbers stand
  // for sequences of schedules, of which every launch takes a new one.
  void set_schedule(uint64_t seed);
  // Throws Fault, with a message that says where.
  char* parameter(uint64_t address, size_t bytes) const; // throws Fault outside of them
  const std::vector<Range>& shared_variables() const { return shared_; }
  void launch(Kernel& kernel, uint32_t blocks, uint32_t threads, size_t dynamic_shared);

  struct Record {
    uint64_t launches = 0, blocks = 0;
    Counts all;     // of all warps
    Counts longest; // of the warp, of any block, that did most
    uint32_t threads = 0;
    size_t shared_bytes = 0;
  };
  std::map<std::string, Record> records; // by kernel

 private:
  struct Schedule {
    bool is_random = false;
    unsigned resident = 1; // blocks
    int64_t longest_turn = INT64_MAX;
    bool splits = false; // lets some lanes of a warp run ahead of the others
  };

  void choose_schedule();
  std::vector<uint32_t> order_of(uint32_t blocks);
  std::unique_ptr<Block> start_block(uint32_t index);
  bool advance(Block& block); // by one turn of one warp; false if none can go on
  bool advance(Warp& warp);
  int64_t turn_length();
  void take_turn(Warp& warp, uint32_t group, int64_t length, int limit);
  void leave(Warp& warp, const Instruction& instruction, uint32_t lanes, int pc);
  uint32_t meet(Warp& warp, uint32_t lanes);
  bool hold_meetings(Warp& warp);
  void pass_barrier(Block& block);
  void finish_block(Block& block);
  std::string describe(const Fault& fault) const;
  std::string describe_waiting(const Block& block) const;
  uint64_t draw(uint64_t count) { return random_() % count; }

  Kernel* kernel_ = nullptr;
  uint32_t blocks_ = 0, threads_ = 0;
  std::vector<Range> shared_; // variables, with the one whose size the launch says
  size_t shared_bytes_ = 0;
  Schedule schedule_;
  std::mt19937_64 random_;
  uint64_t seed_ = 0;
  const Warp* current_warp_ = nullptr;
  int current_pc_ = 0;
};

extern Machine machine;

} // namespace ptx
