// Executes kernels. Every thread has its own program counter, several blocks are resident at once,
// and a random schedule picks which lanes run next.
#pragma once

#include <algorithm>
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

// Events of warps: an instruction counts once for all lanes that execute it together.
enum Event { kInstructions, kGlobalAccesses, kSharedAccesses, kAtomics, kBarriers, kNumEvents };
using Counts = std::array<uint64_t, kNumEvents>;

struct Warp {
  Block* block = nullptr;
  int first_thread = 0; // in the block
  uint32_t live = 0;    // lanes that have not exited
  uint32_t ready = 0;   // live lanes that wait for nothing
  uint32_t at_warp_sync = 0;
  std::array<int, kLanes> pc{};
  std::vector<char> registers;
  const char* constants = nullptr;
  uint64_t last_sync = 0;                               // of all live lanes
  std::vector<std::array<uint64_t, kLanes>> pair_syncs; // of pairs of lanes, in part of the warp
  Counts counts{};
  // Lanes whose value is uninitialized, by register. Such values may be copied, since structs and
  // vectors have padding, but not used. Empty while there are none.
  std::vector<uint32_t> uninitialized;

  void mark_uninitialized(Operand operand, int lane);
  // Throws a Fault if an instruction uses uninitialized values; propagates them if it copies.
  void check_initialized(const Instruction& instruction, uint32_t lanes);

  template <class T>
  char* at(Operand operand) {
    if (operand.is_constant) { // stored in both widths
      return const_cast<char*>(constants) + operand.offset + (sizeof(T) == 8 ? 4 * kLanes : 0);
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
      set(operand, lane, uint32_t(0)); // zero-extend
    }
    std::memcpy(at<T>(operand) + lane * kStride<T>, &value, sizeof value);
  }
  uint32_t predicate(Operand operand) { return get<uint32_t>(operand, 0); }
  void set_predicate(Operand operand, uint32_t lanes, uint32_t values) {
    set(operand, 0, (predicate(operand) & ~lanes) | (values & lanes));
  }
  uint64_t last_sync_of(int lane, int other) const {
    return pair_syncs.empty() ? last_sync : std::max(last_sync, pair_syncs[lane][other]);
  }
};

struct Block {
  uint32_t index = 0;
  std::vector<Warp> warps;
  std::vector<char> shared;
  std::vector<Cell> shared_cells;
  int live = 0, at_barrier = 0; // threads
  int votes = 0;                // of bar.red
  uint64_t last_barrier = 0;
};

// Calls function(lane) for each lane of a mask.
template <class Function>
inline void for_each(uint32_t lanes, Function&& function) {
  for (; lanes != 0; lanes &= lanes - 1) {
    function(std::countr_zero(lanes));
  }
}

class Machine {
 public:
  Memory memory;

  // 0 runs blocks one after the other, with the lanes of a warp converged wherever possible. Other
  // seeds determine a sequence of random schedules, one per launch.
  void set_schedule(uint64_t seed);
  // Returns the host address of kernel parameters; throws a Fault outside of them.
  char* parameter(uint64_t address, size_t bytes) const;
  const std::vector<Range>& shared_variables() const { return shared_; }
  // Runs a kernel to completion. Throws a Fault whose message contains the location.
  void launch(Kernel& kernel, uint32_t blocks, uint32_t threads, size_t dynamic_shared);

  struct Record {
    uint64_t launches = 0, blocks = 0;
    Counts all{};     // sums over all warps
    Counts longest{}; // maxima over all warps
    uint32_t threads = 0;
    size_t shared_bytes = 0;
  };
  std::map<std::string, Record> records; // by kernel

 private:
  struct Schedule {
    bool is_random = false;
    unsigned max_resident = 1;     // blocks
    int64_t max_slice = INT64_MAX; // instructions
    bool splits_groups = false;    // lets some lanes of a converged group run ahead of the others
  };

  void choose_schedule();
  std::vector<uint32_t> block_order(uint32_t blocks);
  std::unique_ptr<Block> start_block(uint32_t index);
  // Run one slice of a warp. Return false if no thread can make progress.
  bool advance(Block& block);
  bool advance(Warp& warp);
  int64_t draw_slice();
  void run_slice(Warp& warp, uint32_t group, int64_t length, int limit);
  void end_slice(Warp& warp, const Instruction& instruction, uint32_t lanes, int pc);
  uint32_t run_warp_sync(Warp& warp, uint32_t lanes);
  bool retry_warp_syncs(Warp& warp);
  void release_barrier(Block& block);
  void finish_block(Block& block);
  std::string describe(const Fault& fault) const;
  std::string describe_waiting(const Block& block) const;
  uint64_t draw(uint64_t count) { return random_() % count; }

  Kernel* kernel_ = nullptr;
  uint32_t blocks_ = 0, threads_ = 0;
  std::vector<Range> shared_; // variables; the last one is the dynamic shared memory
  Schedule schedule_;
  std::mt19937_64 random_;
  uint64_t seed_ = 0;
  const Warp* current_warp_ = nullptr;
  int current_pc_ = 0;
};

extern Machine machine;

} // namespace ptx
