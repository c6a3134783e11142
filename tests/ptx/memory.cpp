#include "memory.h"

#include <algorithm>
#include <bit>

#include "machine.h"

namespace ptx {

namespace {

constexpr uint64_t kMaxIdle = 3'000'000; // accesses without a write before spinning is a fault
constexpr uint64_t kNullPage = 4096;     // addresses below are offsets from a null pointer

// The bytes of cell `index` that an access of [begin, begin + bytes) touches.
uint8_t bytes_in_cell(size_t index, size_t begin, size_t bytes) {
  size_t first = std::max(begin, 4 * index) - 4 * index;
  size_t last = std::min(begin + bytes, 4 * index + 4) - 4 * index;
  return uint8_t((1u << last) - (1u << first));
}

std::string access_of(size_t bytes) { return std::to_string(bytes) + "-byte access"; }

} // namespace

void VectorClock::join(const VectorClock& other) {
  for (const auto& [block, time] : other.blocks) {
    blocks[block] = std::max(blocks[block], time);
  }
  for (const auto& [thread, time] : other.threads) {
    threads[thread] = std::max(threads[thread], time);
  }
}

bool VectorClock::includes(Epoch epoch, uint32_t block) const {
  auto of_block = blocks.find(block);
  auto of_thread = threads.find(epoch.thread);
  return (of_block != blocks.end() && epoch.time <= of_block->second) ||
         (of_thread != threads.end() && epoch.time <= of_thread->second);
}

// ---- regions ----

void Memory::add(
    const void* begin, size_t bytes, bool is_initialized, bool is_read_only, bool is_argument) {
  if (bytes == 0) {
    return;
  }
  auto first = static_cast<const char*>(begin);
  auto next = regions_.lower_bound(first);
  if (next != regions_.begin() && std::prev(next)->first + std::prev(next)->second.bytes > first) {
    --next; // overlaps the beginning of the new region
  }
  while (next != regions_.end() && next->first < first + bytes) {
    next = regions_.erase(next);
  }
  Region region{bytes, is_read_only, is_argument, {}};
  if (!is_read_only) {
    region.cells.resize((bytes + 3) / 4);
    for (Cell& cell : region.cells) {
      cell.initialized = is_initialized ? 0xf : 0;
    }
  }
  last_ = regions_.emplace(first, std::move(region)).first;
}

Region* Memory::find(const void* begin, size_t bytes) {
  auto first = static_cast<const char*>(begin);
  auto holds = [&](auto it) {
    return it != regions_.end() && first >= it->first &&
           first + bytes <= it->first + it->second.bytes;
  };
  if (!holds(last_)) {
    auto next = regions_.upper_bound(first);
    last_ = next == regions_.begin() ? regions_.end() : std::prev(next);
  }
  return holds(last_) ? &last_->second : nullptr;
}

void Memory::mark_written(const void* begin, size_t bytes) {
  if (Region* region = find(begin, bytes); region != nullptr && bytes > 0) {
    size_t first = size_t(static_cast<const char*>(begin) - last_->first);
    for (size_t i = first / 4; i < region->cells.size() && 4 * i < first + bytes; ++i) {
      region->cells[i].initialized |= bytes_in_cell(i, first, bytes);
    }
  }
}

bool Memory::is_argument(const void* begin) {
  const Region* region = find(begin, 0);
  return region != nullptr && region->is_argument;
}

size_t Memory::count_unwritten(const void* begin, size_t bytes) {
  Region* region = bytes > 0 ? find(begin, bytes) : nullptr;
  if (region == nullptr || region->is_read_only) {
    return 0;
  }
  size_t first = size_t(static_cast<const char*>(begin) - last_->first), count = 0;
  for (size_t i = first / 4; 4 * i < first + bytes; ++i) {
    uint8_t missing = bytes_in_cell(i, first, bytes) & ~region->cells[i].initialized;
    count += size_t(std::popcount(missing));
  }
  return count;
}

// ---- accesses ----

void Memory::start_launch(uint32_t threads_per_block) {
  launch_ = last_write_ = tick();
  threads_per_block_ = threads_per_block;
  released_.clear(), thread_clocks_.clear(), block_clocks_.clear();
}

char* Memory::access(Warp& warp, const Instruction& instruction, int lane, Access& access) {
  if (access.address % access.bytes != 0) {
    throw Fault("misaligned " + access_of(access.bytes), lane);
  }
  if (access.writes) {
    last_write_ = now_;
  } else if (now_ - last_write_ > kMaxIdle) {
    throw Fault("livelock: spins on memory that no thread writes", lane);
  }
  std::vector<char>& shared = warp.block->shared;
  if (instruction.space == Space::kShared) {
    return access_shared(warp, instruction, lane, access, size_t(access.address));
  }
  uint64_t offset = access.address - reinterpret_cast<uint64_t>(shared.data());
  if (offset < shared.size()) {
    return access_shared(warp, instruction, lane, access, size_t(offset));
  }
  return access_global(warp, instruction, lane, access);
}

char* Memory::access_shared(
    Warp& warp, const Instruction& instruction, int lane, Access& access, size_t offset) {
  const std::vector<Range>& variables = machine.shared_variables();
  bool inside = std::any_of(variables.begin(), variables.end(), [&](const Range& range) {
    return offset >= range.begin && offset + access.bytes <= range.end;
  });
  if (!inside) {
    throw Fault(access_of(access.bytes) + " outside all shared variables", lane);
  }
  record(warp, instruction, lane, access, warp.block->shared_cells.data(), offset);
  return warp.block->shared.data() + offset;
}

char* Memory::access_global(Warp& warp, const Instruction& instruction, int lane, Access& access) {
  char* at = reinterpret_cast<char*>(access.address);
  Region* region = access.address < kNullPage ? nullptr : find(at, access.bytes);
  if (region == nullptr) {
    const char* what =
        access.address < kNullPage ? " through a null pointer" : " outside all tensors";
    throw Fault(access_of(access.bytes) + what, lane);
  }
  if (region->is_read_only) {
    if (access.writes) {
      throw Fault("write to an input tensor", lane);
    }
    return at;
  }
  record(warp, instruction, lane, access, region->cells.data(), size_t(at - last_->first));
  return at;
}

void Memory::record(
    Warp& warp, const Instruction& instruction, int lane, Access& access, Cell* cells,
    size_t offset) {
  Epoch now{now_, thread_of(warp, lane)};
  for (size_t i = offset / 4; 4 * i < offset + access.bytes; ++i) {
    Cell& cell = cells[i];
    uint8_t bytes = bytes_in_cell(i, offset, access.bytes);
    if (access.reads) {
      uint32_t missing = uint32_t(bytes & ~cell.initialized);
      access.uninitialized |=
          4 * i < offset ? missing >> (offset - 4 * i) : missing << (4 * i - offset);
    }
    if (instruction.is_read_only && cell.write.time > launch_) {
      throw Fault("ld.global.nc of memory that this kernel has written", lane);
    }
    check_races(warp, lane, access, cell, bytes, instruction.is_strong);
    if (access.writes) {
      cell.write = now, cell.written = bytes, cell.strong_write = instruction.is_strong;
      cell.initialized |= bytes;
    } else {
      if (cell.read.thread / kLanes != now.thread / kLanes) {
        cell.other_read = cell.read;
      }
      cell.read = now, cell.was_read = bytes, cell.strong_read = instruction.is_strong;
    }
  }
  if (instruction.is_strong) {
    acquire_and_release(warp, instruction, lane, access);
  }
}

// ---- data races ----

void Memory::check_races(
    const Warp& warp, int lane, const Access& access, const Cell& cell, uint8_t bytes,
    bool is_strong) {
  auto race = [&](Epoch past, const char* what) {
    throw Fault(
        std::string("data race with a ") + what + " by thread " +
            std::to_string(past.thread % threads_per_block_) + " of block " +
            std::to_string(past.thread / threads_per_block_),
        lane);
  };
  if ((bytes & cell.written) && !(is_strong && cell.strong_write) &&
      !happened_before(cell.write, warp, lane)) {
    race(cell.write, "write");
  }
  if (access.writes && (bytes & cell.was_read) && !(is_strong && cell.strong_read)) {
    for (Epoch read : {cell.read, cell.other_read}) {
      if (!happened_before(read, warp, lane)) {
        race(read, "read");
      }
    }
  }
}

bool Memory::happened_before(Epoch past, const Warp& warp, int lane) const {
  uint32_t block = past.thread / threads_per_block_;
  if (past.time <= launch_) {
    return true;
  }
  if (block == warp.block->index) {
    int thread = int(past.thread % threads_per_block_), other = thread - warp.first_thread;
    if (past.time <= warp.block->last_barrier || other == lane) {
      return true;
    }
    if (other >= 0 && other < kLanes && past.time <= warp.last_sync_of(lane, other)) {
      return true;
    }
  }
  auto of_block = block_clocks_.find(warp.block->index);
  auto of_thread = thread_clocks_.find(thread_of(warp, lane));
  return (of_block != block_clocks_.end() && of_block->second.includes(past, block)) ||
         (of_thread != thread_clocks_.end() && of_thread->second.known.includes(past, block));
}

uint32_t Memory::thread_of(const Warp& warp, int lane) const {
  return warp.block->index * threads_per_block_ + uint32_t(warp.first_thread + lane);
}

// A strong write publishes what the thread's last fence released, and a strong read acquires it.
// Atomic read-modify-writes continue the release sequence of an address; plain writes end it.
void Memory::acquire_and_release(
    Warp& warp, const Instruction& instruction, int lane, const Access& access) {
  if (instruction.releases) {
    fence(warp, 1u << lane);
  }
  uint32_t thread = thread_of(warp, lane);
  auto released = released_.find(access.address);
  if (access.reads && released != released_.end()) {
    thread_clocks_[thread].acquired.join(released->second);
  }
  if (access.writes) {
    if (!access.reads) {
      released_.erase(access.address);
    }
    auto own = thread_clocks_.find(thread);
    if (own != thread_clocks_.end() && !own->second.released.is_empty()) {
      released_[access.address].join(own->second.released);
    }
  }
  if (instruction.acquires) {
    fence(warp, 1u << lane);
  }
}

void Memory::fence(Warp& warp, uint32_t lanes) {
  for_each(lanes, [&](int lane) {
    uint32_t thread = thread_of(warp, lane), block = warp.block->index;
    ThreadClocks& own = thread_clocks_[thread];
    own.known.join(own.acquired);
    own.acquired = {};
    own.released = own.known;
    if (auto known = block_clocks_.find(block); known != block_clocks_.end()) {
      own.released.join(known->second);
    }
    own.released.blocks[block] = warp.block->last_barrier;
    own.released.threads[thread] = now_;
    for_each(warp.live & ~(1u << lane), [&](int other) {
      own.released.threads[thread_of(warp, other)] = warp.last_sync_of(lane, other);
    });
  });
}

void Memory::sync_block(Block& block) {
  block.last_barrier = last_write_ = tick();
  for (const Warp& warp : block.warps) {
    for_each(warp.live, [&](int lane) {
      if (auto own = thread_clocks_.find(thread_of(warp, lane)); own != thread_clocks_.end()) {
        block_clocks_[block.index].join(own->second.known);
      }
    });
  }
}

} // namespace ptx
