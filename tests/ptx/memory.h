// Memory checker: bounds, initialization and data races.
//
// Execution is sequentially consistent, so a global time orders all accesses. A race detector with
// vector clocks decides which of them the program orders: by barriers, and by fences around strong
// accesses to the same address (PTX ISA, memory consistency model).
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "program.h"

namespace ptx {

struct Block;

// Aborts a kernel.
struct Fault : std::runtime_error {
  int lane; // -1 if unknown
  bool is_assertion;
  explicit Fault(const std::string& message, int lane = -1, bool is_assertion = false)
      : std::runtime_error(message), lane(lane), is_assertion(is_assertion) {}
};

// Time of an access, and the index of its thread in the grid.
struct Epoch {
  uint64_t time : 40 = 0, thread : 24 = 0;
};

// Shadow state of four bytes of memory.
struct Cell {
  Epoch write, read, other_read;     // latest accesses; `other_read` is by another warp than `read`
  uint8_t written = 0, was_read = 0; // bytes that the latest write and read accessed
  uint8_t initialized = 0;           // bytes
  bool strong_write = false, strong_read = false;
};

struct Region {
  size_t bytes;
  bool is_read_only;
  bool is_argument;        // passed to the op by its caller
  std::vector<Cell> cells; // empty if read-only
};

// Accesses of a block or a thread up to these times happened before.
struct VectorClock {
  std::unordered_map<uint32_t, uint64_t> blocks, threads;

  bool is_empty() const { return blocks.empty() && threads.empty(); }
  void join(const VectorClock& other);
  bool includes(Epoch epoch, uint32_t block) const;
};

// Clocks of a thread that synchronizes by fences.
struct ThreadClocks {
  VectorClock known;    // happened before the next instruction
  VectorClock acquired; // by strong reads; known after the next fence
  VectorClock released; // by the last fence; published by strong writes
};

class Memory {
 public:
  // Registers memory, replacing overlapping regions. Read-only memory counts as initialized.
  void add(
      const void* begin, size_t bytes, bool is_initialized, bool is_read_only,
      bool is_argument = false);
  void mark_written(const void* begin, size_t bytes);
  bool is_argument(const void* begin);
  size_t count_unwritten(const void* begin, size_t bytes); // bytes
  void clear() { regions_.clear(), last_ = regions_.end(); }

  void start_launch(uint32_t threads_per_block);
  uint64_t tick() { return now_++; } // returns the time of the current instruction and ends it

  struct Access {
    uint64_t address = 0;
    size_t bytes = 0;
    bool reads = false, writes = false;
    uint32_t uninitialized = 0; // mask of bytes
  };
  // Checks and records an access; returns the host address.
  char* access(Warp&, const Instruction&, int lane, Access&);
  void fence(Warp&, uint32_t lanes);
  // After a barrier, all threads of a block know what any of them knew.
  void sync_block(Block& block);

 private:
  Region* find(const void* begin, size_t bytes);
  char* access_shared(Warp&, const Instruction&, int lane, Access&, size_t offset);
  char* access_global(Warp&, const Instruction&, int lane, Access&);
  void record(Warp&, const Instruction&, int lane, Access&, Cell* cells, size_t offset);
  void check_races(
      const Warp&, int lane, const Access&, const Cell&, uint8_t bytes, bool is_strong);
  bool happened_before(Epoch past, const Warp&, int lane) const;
  void acquire_and_release(Warp&, const Instruction&, int lane, const Access&);
  uint32_t thread_of(const Warp&, int lane) const;

  std::map<const char*, Region> regions_;                         // by address
  std::map<const char*, Region>::iterator last_ = regions_.end(); // result of the last find()
  std::unordered_map<uint64_t, VectorClock> released_;            // by address, by strong writes
  std::unordered_map<uint32_t, ThreadClocks> thread_clocks_;
  std::unordered_map<uint32_t, VectorClock> block_clocks_;
  uint64_t now_ = 1, launch_ = 0, last_write_ = 0; // times
  uint32_t threads_per_block_ = 1;
};

} // namespace ptx
