// Memory that kernels see: its bounds, which of it was written, and whether two threads have accessed
// it without an order between them.
//
// Execution is sequentially consistent, so an access is known by the time at which it happened. What
// orders accesses of different threads are barriers, and fences around atomic accesses to one place
// (PTX ISA, memory consistency model): for each thread is known up to which time it has learned of
// other threads' accesses.
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

// Why a kernel ends before its time.
struct Fault : std::runtime_error {
  int lane; // -1 where no thread is to blame
  bool is_assertion;
  explicit Fault(const std::string& message, int lane = -1, bool is_assertion = false)
      : std::runtime_error(message), lane(lane), is_assertion(is_assertion) {}
};

// Who did something, and when. Threads are numbered through all blocks of a launch.
struct Stamp {
  uint64_t time : 40 = 0, thread : 24 = 0;
};

// Four bytes and what has happened to them.
struct Cell {
  Stamp write, read, other_read;     // the last ones; `other_read` of another warp than `read`
  uint8_t written = 0, was_read = 0; // bytes, by these accesses
  uint8_t initialized = 0;           // bytes
  bool strong_write = false, strong_read = false;
};

struct Region {
  size_t bytes;
  bool is_read_only, is_given;
  std::vector<Cell> cells; // empty where nobody may write
};

// Up to which time accesses of blocks and of threads happened before.
struct History {
  std::unordered_map<uint32_t, uint64_t> blocks, threads;

  bool is_empty() const { return blocks.empty() && threads.empty(); }
  void join(const History& other);
};

// What a thread that uses fences has to hand on.
struct Fences {
  History known;    // before everything it does now
  History acquired; // from places it has read; known after its next fence
  History released; // by its last fence
};

class Memory {
 public:
  // Replaces what was known of this place. What is only read is taken to be initialized.
  void add(
      const void* begin, size_t bytes, bool is_initialized, bool is_read_only,
      bool is_given = false);
  void mark_written(const void* begin, size_t bytes);
  bool is_given(const void* begin) { // to the op, by its caller
    const Region* region = find(begin, 0);
    return region != nullptr && region->is_given;
  }
  size_t count_unwritten(const void* begin, size_t bytes);
  void clear() { regions_.clear(), last_ = regions_.end(); }

  void start_launch(uint32_t threads_per_block);
  uint64_t take_time() { return now_++; } // ends what happens at the same time

  // Checks an access and keeps it in mind; returns where it goes.
  struct Access {
    uint64_t address = 0;
    size_t bytes = 0;
    bool reads = false, writes = false;
    uint32_t undefined = 0; // a bit for each byte that was read before it was written
  };
  char* access(Warp&, const Instruction&, int lane, Access&);
  void fence(Warp&, uint32_t lanes);
  // After a barrier all threads of a block know what one of them knew.
  void meet(Block& block);

 private:
  Region* find(const void* begin, size_t bytes);
  char* access_shared(Warp&, const Instruction&, int lane, Access&, size_t offset);
  char* access_global(Warp&, const Instruction&, int lane, Access&);
  void note(Warp&, const Instruction&, int lane, Access&, Cell* cells, size_t offset);
  void check_order(
      const Warp&, int lane, const Access&, const Cell&, uint8_t bytes, bool is_strong);
  bool is_ordered(Stamp past, const Warp&, int lane) const;
  void hand_over(Warp&, const Instruction&, int lane, const Access&);
  uint32_t number_of(const Warp&, int lane) const;

  std::map<const char*, Region> regions_;
  std::map<const char*, Region>::iterator last_ = regions_.end(); // the last one found
  std::unordered_map<uint64_t, History> places_; // what strong writes have released there
  std::unordered_map<uint32_t, Fences> fences_;  // by thread
  std::unordered_map<uint32_t, History> known_;  // by block
  uint64_t now_ = 1, launch_ = 0, changed_ = 0;  // times
  uint32_t threads_per_block_ = 1;
};

} // namespace ptx
