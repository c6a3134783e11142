#include "memory.h"

#include <algorithm>
#include <bit>

#include "machine.h"

namespace ptx {

namespace {

constexpr uint64_t kMostIdle = 3'000'000; // accesses of a warp without a write
constexpr uint64_t kNull = 4096;          // addresses below are null pointers and offsets from them

// The bytes of cell `index` that an access of [begin, begin + bytes) touches.
uint8_t bytes_in_cell(size_t index, size_t begin, size_t bytes) {
  size_t first = std::max(begin, 4 * index) - 4 * index;
  size_t last = std::min(begin + bytes, 4 * index + 4) - 4 * index;
  return uint8_t((1u << last) - (1u << first));
}

std::string count_bytes(size_t bytes) { return std::to_string(bytes) + " bytes"; }

} // namespace

void History::join(const History& other) {
  for (const auto& [block, time] : other.blocks) {
    blocks[block] = std::max(blocks[block], time);
  }
  for (const auto& [thread, time] : other.threads) {
    threads[thread] = std::max(threads[thread], time);
  }
}

// ---- what there is ----

void Memory::add(
    const void* begin, size_t bytes, bool is_initialized, bool is_read_only, bool is_given) {
  if (bytes == 0) {
    return;
  }
  auto first = static_cast<const char*>(begin);
  auto next = regions_.lower_bound(first);
  if (next != regions_.begin() && std::prev(next)->first + std::prev(next)->second.bytes > first) {
    --next; // it begins before this one
  }
  while (next != regions_.end() && next->first < first + bytes) {
    next = regions_.erase(next);
  }
  Region region{bytes, is_read_only, is_given, {}};
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
  launch_ = changed_ = take_time();
  threads_per_block_ = threads_per_block;
  places_.clear(), fences_.clear(), known_.clear();
}

char* Memory::access(Warp& warp, const Instruction& instruction, int lane, Access& access) {
  if (access.address % access.bytes != 0) {
    throw Fault("misaligned address of " + count_bytes(access.bytes), lane);
  }
  if (access.writes) {
    changed_ = now_;
  } else if (now_ - changed_ > kMostIdle) {
    throw Fault("it reads for ever, and nobody writes", lane);
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
    throw Fault(count_bytes(access.bytes) + " outside of every shared variable", lane);
  }
  note(warp, instruction, lane, access, warp.block->shared_cells.data(), offset);
  return warp.block->shared.data() + offset;
}

char* Memory::access_global(Warp& warp, const Instruction& instruction, int lane, Access& access) {
  char* at = reinterpret_cast<char*>(access.address);
  Region* region = access.address < kNull ? nullptr : find(at, access.bytes);
  if (region == nullptr) {
    const char* what = access.address < kNull ? " at a null pointer" : " outside of every tensor";
    throw Fault(count_bytes(access.bytes) + what, lane);
  }
  if (region->is_read_only) {
    if (access.writes) {
      throw Fault("a write to an input", lane);
    }
    return at;
  }
  note(warp, instruction, lane, access, region->cells.data(), size_t(at - last_->first));
  return at;
}

void Memory::note(
    Warp& warp, const Instruction& instruction, int lane, Access& access, Cell* cells,
    size_t offset) {
  Stamp stamp{now_, number_of(warp, lane)};
  for (size_t i = offset / 4; 4 * i < offset + access.bytes; ++i) {
    Cell& cell = cells[i];
    uint8_t bytes = bytes_in_cell(i, offset, access.bytes);
    if (access.reads) {
      uint32_t missing = uint32_t(bytes & ~cell.initialized);
      access.undefined |=
          4 * i < offset ? missing >> (offset - 4 * i) : missing << (4 * i - offset);
    }
    if (instruction.is_read_only && cell.write.time > launch_) {
      throw Fault("reads by ld.global.nc what this kernel has written", lane);
    }
    check_order(warp, lane, access, cell, bytes, instruction.is_strong);
    if (access.writes) {
      cell.write = stamp, cell.written = bytes, cell.strong_write = instruction.is_strong;
      cell.initialized |= bytes;
    } else {
      if (cell.read.thread / kLanes != stamp.thread / kLanes) {
        cell.other_read = cell.read;
      }
      cell.read = stamp, cell.was_read = bytes, cell.strong_read = instruction.is_strong;
    }
  }
  if (instruction.is_strong) {
    hand_over(warp, instruction, lane, access);
  }
}

// ---- races ----

void Memory::check_order(
    const Warp& warp, int lane, const Access& access, const Cell& cell, uint8_t bytes,
    bool is_strong) {
  auto race = [&](Stamp past, const char* what) {
    throw Fault(
        std::string("race: not ordered after a ") + what + " of thread " +
            std::to_string(past.thread % threads_per_block_) + " of block " +
            std::to_string(past.thread / threads_per_block_),
        lane);
  };
  if ((bytes & cell.written) && !(is_strong && cell.strong_write) &&
      !is_ordered(cell.write, warp, lane)) {
    race(cell.write, "write");
  }
  if (access.writes && (bytes & cell.was_read) && !(is_strong && cell.strong_read)) {
    for (Stamp read : {cell.read, cell.other_read}) {
      if (!is_ordered(read, warp, lane)) {
        race(read, "read");
      }
    }
  }
}

bool Memory::is_ordered(Stamp past, const Warp& warp, int lane) const {
  uint32_t block = past.thread / threads_per_block_;
  if (past.time <= launch_) {
    return true;
  }
  if (block == warp.block->index) {
    int thread = int(past.thread % threads_per_block_), other = thread - warp.first_thread;
    if (past.time <= warp.block->last_barrier || other == lane) {
      return true;
    }
    if (other >= 0 && other < kLanes && past.time <= warp.met(lane, other)) {
      return true;
    }
  }
  auto knows = [&](const History& history) {
    auto of_block = history.blocks.find(block);
    auto of_thread = history.threads.find(past.thread);
    return (of_block != history.blocks.end() && past.time <= of_block->second) ||
           (of_thread != history.threads.end() && past.time <= of_thread->second);
  };
  auto of_block = known_.find(warp.block->index);
  auto of_thread = fences_.find(number_of(warp, lane));
  return (of_block != known_.end() && knows(of_block->second)) ||
         (of_thread != fences_.end() && knows(of_thread->second.known));
}

uint32_t Memory::number_of(const Warp& warp, int lane) const {
  return warp.block->index * threads_per_block_ + uint32_t(warp.first_thread + lane);
}

// A strong write releases what a fence before it has ordered, a strong read acquires it. Writes that
// also read hand on what they found.
void Memory::hand_over(Warp& warp, const Instruction& instruction, int lane, const Access& access) {
  if (instruction.releases) {
    fence(warp, 1u << lane);
  }
  uint32_t thread = number_of(warp, lane);
  auto place = places_.find(access.address);
  if (access.reads && place != places_.end()) {
    fences_[thread].acquired.join(place->second);
  }
  if (access.writes) {
    auto own = fences_.find(thread);
    bool has_released = own != fences_.end() && !own->second.released.is_empty();
    if (!access.reads && place != places_.end()) {
      places_.erase(place);
    }
    if (has_released) {
      places_[access.address].join(own->second.released);
    }
  }
  if (instruction.acquires) {
    fence(warp, 1u << lane);
  }
}

void Memory::fence(Warp& warp, uint32_t lanes) {
  for_each(lanes, [&](int lane) {
    uint32_t thread = number_of(warp, lane), block = warp.block->index;
    Fences& own = fences_[thread];
    own.known.join(own.acquired);
    own.acquired = {};
    own.released = own.known;
    if (auto known = known_.find(block); known != known_.end()) {
      own.released.join(known->second);
    }
    own.released.blocks[block] = warp.block->last_barrier;
    own.released.threads[thread] = now_;
    for_each(warp.live & ~(1u << lane), [&](int other) {
      own.released.threads[number_of(warp, other)] = warp.met(lane, other);
    });
  });
}

void Memory::meet(Block& block) {
  block.last_barrier = changed_ = take_time();
  for (const Warp& warp : block.warps) {
    for_each(warp.live, [&](int lane) {
      if (auto own = fences_.find(number_of(warp, lane)); own != fences_.end()) {
        known_[block.index].join(own->second.known);
      }
    });
  }
}

} // namespace ptx
