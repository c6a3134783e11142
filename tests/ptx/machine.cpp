#include "machine.h"

#include <algorithm>
#include <climits>
#include <numeric>

namespace ptx {

Machine machine;

namespace {

constexpr int kMaxResident = 8;                      // blocks
constexpr int64_t kMaxSlices[] = {3, 30, 400, 5000}; // instructions
constexpr char kPoison = char(0xff); // uninitialized memory: NaN and invalid indices

uint32_t lanes_at(const Warp& warp, uint32_t among, int pc) {
  uint32_t lanes = 0;
  for_each(among, [&](int lane) { lanes |= uint32_t(warp.pc[lane] == pc) << lane; });
  return lanes;
}

int lowest_pc(const Warp& warp, uint32_t lanes) {
  int lowest = INT_MAX;
  for_each(lanes, [&](int lane) { lowest = std::min(lowest, warp.pc[lane]); });
  return lowest;
}

void set_pc(Warp& warp, uint32_t lanes, int pc) {
  for_each(lanes, [&](int lane) { warp.pc[lane] = pc; });
}

} // namespace

void Warp::mark_uninitialized(Operand operand, int lane) {
  uninitialized.resize(registers.size() / 4);
  uninitialized[size_t(operand.offset) / 4] |= 1u << lane;
}

void Warp::check_initialized(const Instruction& instruction, uint32_t lanes) {
  uint32_t bad = 0;
  for (Operand operand :
       {instruction.in[0], instruction.in[1], instruction.in[2], instruction.in[3],
        instruction.in[4], instruction.mask}) {
    if (operand && !operand.is_constant) {
      bad |= uninitialized[size_t(operand.offset) / 4] & lanes;
    }
  }
  if (bad != 0 && !instruction.is_copy) {
    throw Fault("use of an uninitialized value", std::countr_zero(bad));
  }
  for (Operand operand : instruction.out) {
    if (operand) {
      uint32_t& state = uninitialized[size_t(operand.offset) / 4];
      state = (state & ~lanes) | bad;
    }
  }
}

void Machine::set_schedule(uint64_t seed) {
  seed_ = seed;
  random_.seed(seed);
}

char* Machine::parameter(uint64_t address, size_t bytes) const {
  uint64_t offset = address - reinterpret_cast<uint64_t>(kernel_->arguments.data());
  if (offset + bytes > kernel_->arguments.size() || offset % bytes != 0) {
    throw Fault("read outside the kernel parameters");
  }
  return kernel_->arguments.data() + offset;
}

void Machine::choose_schedule() {
  schedule_ = {};
  if (seed_ != 0) {
    schedule_.is_random = true;
    schedule_.max_resident = 1 + unsigned(draw(kMaxResident));
    schedule_.max_slice = kMaxSlices[draw(std::size(kMaxSlices))];
    schedule_.splits_groups = draw(3) == 0;
  }
}

// Blocks may start in any order.
std::vector<uint32_t> Machine::block_order(uint32_t blocks) {
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule_.is_random && draw(2) == 0) {
    std::shuffle(order.begin(), order.end(), random_);
  }
  return order;
}

std::unique_ptr<Block> Machine::start_block(uint32_t index) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->live = int(threads_);
  block->last_barrier = memory.tick();
  block->shared.assign(shared_.back().end, kPoison);
  block->shared_cells.resize(block->shared.size() / 4 + 1);
  block->warps.resize((threads_ + kLanes - 1) / kLanes);
  for (size_t w = 0; w < block->warps.size(); ++w) {
    Warp& warp = block->warps[w];
    warp.block = block.get();
    warp.first_thread = int(w) * kLanes;
    int lanes = std::min(int(threads_) - warp.first_thread, kLanes);
    warp.live = warp.ready = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    warp.registers.assign(kernel_->register_bytes, kPoison);
    warp.constants = kernel_->constants.data();
    for (const auto& [name, where] : kernel_->special_registers) {
      for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t value = name == "%tid.x"      ? uint32_t(warp.first_thread + lane)
                         : name == "%ctaid.x"  ? index
                         : name == "%ntid.x"   ? threads_
                         : name == "%nctaid.x" ? blocks_
                         : name == "%laneid"   ? uint32_t(lane)
                                               : 0u;
        warp.set(where, lane, value);
      }
    }
  }
  return block;
}

void Machine::launch(Kernel& kernel, uint32_t blocks, uint32_t threads, size_t dynamic_shared) {
  kernel_ = &kernel, blocks_ = blocks, threads_ = threads;
  shared_ = kernel.shared;
  shared_.push_back({kernel.shared_bytes, kernel.shared_bytes + dynamic_shared});
  current_warp_ = nullptr;
  choose_schedule();
  memory.start_launch(threads);
  std::vector<uint32_t> order = block_order(blocks);
  std::vector<std::unique_ptr<Block>> resident;
  size_t next = 0;
  ++records[kernel.name].launches;
  try {
    while (next < order.size() || !resident.empty()) {
      while (resident.size() < schedule_.max_resident && next < order.size()) {
        resident.push_back(start_block(order[next++]));
      }
      size_t first = schedule_.is_random ? draw(resident.size()) : 0, tried = 0;
      while (tried < resident.size() && !advance(*resident[(first + tried) % resident.size()])) {
        ++tried;
      }
      if (tried == resident.size()) {
        throw Fault("divergent barrier: " + describe_waiting(*resident[first]));
      }
      Block& block = *resident[(first + tried) % resident.size()];
      if (block.live == 0) {
        finish_block(block);
        resident.erase(resident.begin() + long((first + tried) % resident.size()));
      }
    }
  } catch (const Fault& fault) {
    throw Fault(describe(fault), fault.lane, fault.is_assertion);
  }
}

bool Machine::advance(Block& block) {
  size_t count = block.warps.size(), first = schedule_.is_random ? draw(count) : 0;
  for (size_t i = 0; i < count; ++i) {
    if (advance(block.warps[(first + i) % count])) {
      return true;
    }
  }
  if (block.live == 0 || block.at_barrier < block.live) {
    return block.live == 0;
  }
  release_barrier(block);
  return true;
}

bool Machine::advance(Warp& warp) {
  bool progress = warp.at_warp_sync != 0 && retry_warp_syncs(warp);
  if (warp.ready == 0) {
    return progress;
  }
  if (!schedule_.is_random || draw(2) == 0) { // lowest PC first, so that lanes reconverge
    int pc = lowest_pc(warp, warp.ready);
    uint32_t group = lanes_at(warp, warp.ready, pc);
    run_slice(warp, group, draw_slice(), lowest_pc(warp, warp.ready & ~group));
    return true;
  }
  uint32_t chosen = warp.ready;
  for (uint64_t skip = draw(uint64_t(std::popcount(chosen))); skip > 0; --skip) {
    chosen &= chosen - 1;
  }
  uint32_t group = lanes_at(warp, warp.ready, warp.pc[std::countr_zero(chosen)]);
  uint32_t part = group & uint32_t(random_());
  run_slice(warp, schedule_.splits_groups && part != 0 ? part : group, draw_slice(), INT_MAX);
  return true;
}

int64_t Machine::draw_slice() {
  return schedule_.is_random ? 1 + int64_t(draw(uint64_t(schedule_.max_slice))) : INT64_MAX;
}

// Runs lanes with the same PC until they diverge, wait, reach the PC `limit` where other lanes are,
// or have executed `length` instructions.
void Machine::run_slice(Warp& warp, uint32_t group, int64_t length, int limit) {
  int pc = warp.pc[std::countr_zero(group)];
  current_warp_ = &warp;
  for (; length > 0 && pc < limit; --length) {
    const Instruction& instruction = kernel_->code[size_t(pc)];
    current_pc_ = pc;
    kernel_->executed[size_t(pc)] = 1;
    ++warp.counts[kInstructions];
    uint32_t lanes = group;
    if (instruction.guard) {
      uint32_t guard = warp.predicate(instruction.guard);
      lanes &= instruction.inverts_guard ? ~guard : guard;
    }
    if (!warp.uninitialized.empty()) {
      warp.check_initialized(instruction, lanes);
    }
    if (lanes == 0) {
      ++pc;
    } else if (instruction.flow == Flow::kNext) {
      instruction.run(warp, instruction, lanes);
      ++pc;
    } else if (instruction.flow == Flow::kBranch && lanes == group) {
      pc = instruction.target;
    } else if (instruction.flow == Flow::kWarpSync && run_warp_sync(warp, lanes) == lanes) {
      ++pc;
    } else {
      set_pc(warp, group & ~lanes, pc + 1);
      return end_slice(warp, instruction, lanes, pc);
    }
  }
  set_pc(warp, group, pc);
}

// Branches with part of the group, exits, or starts to wait.
void Machine::end_slice(Warp& warp, const Instruction& instruction, uint32_t lanes, int pc) {
  if (instruction.flow == Flow::kBranch) {
    return set_pc(warp, lanes, instruction.target);
  }
  set_pc(warp, lanes, pc);
  warp.ready &= ~lanes;
  if (instruction.flow == Flow::kExit) {
    warp.live &= ~lanes;
    warp.block->live -= std::popcount(lanes);
  } else if (instruction.flow == Flow::kBarrier) {
    ++warp.counts[kBarriers];
    warp.block->at_barrier += std::popcount(lanes);
  } else {
    warp.at_warp_sync |= lanes;
  }
}

// Executes a .sync instruction for each mask whose lanes have all arrived, and returns these lanes.
// The others retry in the warp's next slice.
uint32_t Machine::run_warp_sync(Warp& warp, uint32_t lanes) {
  const Instruction& instruction = kernel_->code[size_t(current_pc_)];
  uint32_t done = 0;
  for (uint32_t left = lanes; left != 0;) {
    int first = std::countr_zero(left);
    uint32_t mask = warp.get<uint32_t>(instruction.mask, first);
    if (!(mask >> first & 1)) {
      throw Fault("the mask lacks the executing lane", first);
    }
    if (mask & ~warp.live) {
      throw Fault("the mask contains lanes that have exited or do not exist", first);
    }
    for_each(mask & lanes, [&](int lane) {
      if (warp.get<uint32_t>(instruction.mask, lane) != mask) {
        throw Fault("lanes of one mask pass different masks", lane);
      }
    });
    if ((mask & ~lanes) == 0) {
      instruction.run(warp, instruction, mask);
      done |= mask;
    }
    left &= ~mask;
  }
  return done;
}

bool Machine::retry_warp_syncs(Warp& warp) {
  uint32_t done = 0;
  for (uint32_t left = warp.at_warp_sync; left != 0;) {
    current_warp_ = &warp, current_pc_ = warp.pc[std::countr_zero(left)];
    uint32_t lanes = lanes_at(warp, warp.at_warp_sync, current_pc_);
    uint32_t synced = run_warp_sync(warp, lanes);
    set_pc(warp, synced, current_pc_ + 1);
    left &= ~lanes, done |= synced;
  }
  warp.at_warp_sync &= ~done;
  warp.ready |= done;
  return done != 0;
}

// Called when all live threads of a block wait at barriers.
void Machine::release_barrier(Block& block) {
  const Warp& any = *std::ranges::find_if(block.warps, [](const Warp& w) { return w.live != 0; });
  current_warp_ = &any, current_pc_ = any.pc[std::countr_zero(any.live)];
  const Instruction& instruction = kernel_->code[size_t(current_pc_)];
  block.votes = 0;
  for (Warp& warp : block.warps) {
    if (block.live != int(threads_) || lanes_at(warp, warp.live, current_pc_) != warp.live) {
      throw Fault("divergent barrier: " + describe_waiting(block));
    }
    if (instruction.in[0]) {
      block.votes += std::popcount(warp.predicate(instruction.in[0]) & warp.live);
    }
  }
  for (Warp& warp : block.warps) {
    if (instruction.run != nullptr) {
      instruction.run(warp, instruction, warp.live);
    }
    set_pc(warp, warp.live, current_pc_ + 1);
    warp.ready = warp.live;
  }
  block.at_barrier = 0;
  memory.sync_block(block);
}

void Machine::finish_block(Block& block) {
  Record& record = records[kernel_->name];
  ++record.blocks;
  record.threads = threads_, record.shared_bytes = block.shared.size();
  for (const Warp& warp : block.warps) {
    for (size_t i = 0; i < kNumEvents; ++i) {
      record.all[i] += warp.counts[i];
      record.longest[i] = std::max(record.longest[i], warp.counts[i]);
    }
  }
}

std::string Machine::describe(const Fault& fault) const {
  std::string out = fault.what();
  if (fault.is_assertion || current_warp_ == nullptr) {
    return out;
  }
  const Source& source = kernel_->sources[size_t(current_pc_)];
  int lane = fault.lane < 0 ? 0 : fault.lane;
  out += "; `" + source.text + "` (" + kernel_->file + ":" + std::to_string(source.line);
  out += source.location.empty() ? ")" : ", " + source.location + ")";
  out += ", thread " + std::to_string(current_warp_->first_thread + lane) + " of block ";
  return out + std::to_string(current_warp_->block->index) + ", " + kernel_->name;
}

// "32 threads wait at select_candidates.cu:12, 224 have exited"
std::string Machine::describe_waiting(const Block& block) const {
  std::map<std::string, int> places;
  for (const Warp& warp : block.warps) {
    for_each(warp.live & ~warp.ready, [&](int lane) {
      const Source& source = kernel_->sources[size_t(warp.pc[lane])];
      ++places["wait at " + source.location + " (line " + std::to_string(source.line) + ")"];
    });
  }
  if (int exited = int(threads_) - block.live) {
    places["have exited"] = exited;
  }
  std::string out;
  for (const auto& [place, count] : places) {
    out += (out.empty() ? "" : ", ") + std::to_string(count) + " threads " + place;
  }
  return out;
}

} // namespace ptx
