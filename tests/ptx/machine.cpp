#include "machine.h"

#include <algorithm>
#include <climits>
#include <map>
#include <numeric>

namespace ptx {

Machine machine;

namespace {

constexpr int kMostResident = 8; // blocks
constexpr int64_t kTurns[] = {3, 30, 400, 5000};
constexpr char kGarbage = char(0xff);

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

void Counts::add(const Counts& other) {
  instructions += other.instructions, global_accesses += other.global_accesses;
  shared_accesses += other.shared_accesses, atomics += other.atomics, barriers += other.barriers;
}

void Counts::raise(const Counts& other) {
  instructions = std::max(instructions, other.instructions);
  global_accesses = std::max(global_accesses, other.global_accesses);
  shared_accesses = std::max(shared_accesses, other.shared_accesses);
  atomics = std::max(atomics, other.atomics), barriers = std::max(barriers, other.barriers);
}

void Warp::mark_undefined(Operand operand, int lane) {
  undefined.resize(registers.size() / 4);
  undefined[size_t(operand.offset) / 4] |= 1u << lane;
}

void Warp::check_defined(const Instruction& instruction, uint32_t lanes) {
  uint32_t bad = 0;
  for (Operand operand :
       {instruction.in[0], instruction.in[1], instruction.in[2], instruction.in[3],
        instruction.in[4], instruction.mask}) {
    if (operand && !operand.is_constant) {
      bad |= undefined[size_t(operand.offset) / 4] & lanes;
    }
  }
  if (bad != 0 && !instruction.is_copy) {
    throw Fault("uses what was read before it was written", std::countr_zero(bad));
  }
  for (Operand operand : instruction.out) {
    if (operand) {
      uint32_t& lanes_of = undefined[size_t(operand.offset) / 4];
      lanes_of = (lanes_of & ~lanes) | bad;
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
    throw Fault("reads beside the parameters of the kernel");
  }
  return kernel_->arguments.data() + offset;
}

void Machine::choose_schedule() {
  schedule_ = {};
  if (seed_ != 0) {
    schedule_.is_random = true;
    schedule_.resident = 1 + unsigned(draw(kMostResident));
    schedule_.longest_turn = kTurns[draw(std::size(kTurns))];
    schedule_.splits = draw(3) == 0;
  }
}

// Hardware promises no order in which blocks start.
std::vector<uint32_t> Machine::order_of(uint32_t blocks) {
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
  block->last_barrier = memory.take_time();
  block->shared.assign(shared_bytes_, kGarbage);
  block->shared_cells.resize(block->shared.size() / 4 + 1);
  block->warps.resize((threads_ + kLanes - 1) / kLanes);
  for (size_t w = 0; w < block->warps.size(); ++w) {
    Warp& warp = block->warps[w];
    warp.block = block.get();
    warp.first_thread = int(w) * kLanes;
    int lanes = std::min(int(threads_) - warp.first_thread, kLanes);
    warp.live = warp.ready = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    warp.registers.assign(kernel_->register_bytes, kGarbage);
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
  shared_bytes_ = shared_.back().end;
  current_warp_ = nullptr;
  choose_schedule();
  memory.start_launch(threads);
  std::vector<uint32_t> order = order_of(blocks);
  std::vector<std::unique_ptr<Block>> resident;
  size_t next = 0;
  ++records[kernel.name].launches;
  try {
    while (next < order.size() || !resident.empty()) {
      while (resident.size() < schedule_.resident && next < order.size()) {
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
  pass_barrier(block);
  return true;
}

bool Machine::advance(Warp& warp) {
  bool met = warp.at_meeting != 0 && hold_meetings(warp);
  if (warp.ready == 0) {
    return met;
  }
  if (!schedule_.is_random || draw(2) == 0) { // together, wherever they can be
    int pc = lowest_pc(warp, warp.ready);
    uint32_t group = lanes_at(warp, warp.ready, pc);
    take_turn(warp, group, turn_length(), lowest_pc(warp, warp.ready & ~group));
    return true;
  }
  uint32_t chosen = warp.ready;
  for (uint64_t skip = draw(uint64_t(std::popcount(chosen))); skip > 0; --skip) {
    chosen &= chosen - 1;
  }
  uint32_t group = lanes_at(warp, warp.ready, warp.pc[std::countr_zero(chosen)]);
  uint32_t part = group & uint32_t(random_());
  take_turn(warp, schedule_.splits && part != 0 ? part : group, turn_length(), INT_MAX);
  return true;
}

int64_t Machine::turn_length() {
  return schedule_.is_random ? 1 + int64_t(draw(uint64_t(schedule_.longest_turn))) : INT64_MAX;
}

// Runs lanes that stand at the same instruction, until they part or wait, come to others at `limit`,
// or the turn is over.
void Machine::take_turn(Warp& warp, uint32_t group, int64_t length, int limit) {
  int pc = warp.pc[std::countr_zero(group)];
  current_warp_ = &warp;
  for (; length > 0 && pc < limit; --length) {
    const Instruction& instruction = kernel_->code[size_t(pc)];
    current_pc_ = pc;
    kernel_->executed[size_t(pc)] = 1;
    ++warp.counts.instructions;
    uint32_t lanes = group;
    if (instruction.guard) {
      uint32_t guard = warp.predicate(instruction.guard);
      lanes &= instruction.inverts_guard ? ~guard : guard;
    }
    if (!warp.undefined.empty()) {
      warp.check_defined(instruction, lanes);
    }
    if (lanes == 0) {
      ++pc;
    } else if (instruction.flow == Flow::kNext) {
      instruction.run(warp, instruction, lanes);
      ++pc;
    } else if (instruction.flow == Flow::kBranch && lanes == group) {
      pc = instruction.target;
    } else if (instruction.flow == Flow::kMeeting && meet(warp, lanes) == lanes) {
      ++pc;
    } else {
      set_pc(warp, group & ~lanes, pc + 1);
      return leave(warp, instruction, lanes, pc);
    }
  }
  set_pc(warp, group, pc);
}

// What ends a turn: lanes go somewhere else, wait, or are done.
void Machine::leave(Warp& warp, const Instruction& instruction, uint32_t lanes, int pc) {
  if (instruction.flow == Flow::kBranch) {
    return set_pc(warp, lanes, instruction.target);
  }
  set_pc(warp, lanes, pc);
  warp.ready &= ~lanes;
  if (instruction.flow == Flow::kExit) {
    warp.live &= ~lanes;
    warp.block->live -= std::popcount(lanes);
  } else if (instruction.flow == Flow::kBarrier) {
    ++warp.counts.barriers;
    warp.at_barrier |= lanes;
    warp.block->at_barrier += std::popcount(lanes);
  } else {
    warp.at_meeting |= lanes;
  }
}

// Of lanes at one instruction, which waits for all in its mask, lets those do it that have all come;
// returns them. A meeting that has not taken place is tried again whenever the warp has its turn.
uint32_t Machine::meet(Warp& warp, uint32_t lanes) {
  const Instruction& instruction = kernel_->code[size_t(current_pc_)];
  uint32_t served = 0;
  for (uint32_t left = lanes; left != 0;) {
    int first = std::countr_zero(left);
    uint32_t mask = warp.get<uint32_t>(instruction.mask, first);
    if (!(mask >> first & 1)) {
      throw Fault("a lane outside its own mask", first);
    }
    if (mask & ~warp.live) {
      throw Fault("its mask has lanes that have exited or never were", first);
    }
    for_each(mask & lanes, [&](int lane) {
      if (warp.get<uint32_t>(instruction.mask, lane) != mask) {
        throw Fault("lanes that meet have different masks", lane);
      }
    });
    if ((mask & ~lanes) == 0) {
      instruction.run(warp, instruction, mask);
      served |= mask;
    }
    left &= ~mask;
  }
  return served;
}

// Serves lanes that wait for each other and have all come.
bool Machine::hold_meetings(Warp& warp) {
  uint32_t served = 0;
  for (uint32_t left = warp.at_meeting; left != 0;) {
    current_warp_ = &warp, current_pc_ = warp.pc[std::countr_zero(left)];
    uint32_t lanes = lanes_at(warp, warp.at_meeting, current_pc_);
    uint32_t done = meet(warp, lanes);
    set_pc(warp, done, current_pc_ + 1);
    left &= ~lanes, served |= done;
  }
  warp.at_meeting &= ~served;
  warp.ready |= served;
  return served != 0;
}

// All threads that have not exited wait.
void Machine::pass_barrier(Block& block) {
  const Warp& any = *std::find_if(
      block.warps.begin(), block.warps.end(), [](const Warp& warp) { return warp.live != 0; });
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
    warp.ready = warp.live, warp.at_barrier = 0;
  }
  block.at_barrier = 0;
  memory.meet(block);
}

void Machine::finish_block(Block& block) {
  Record& record = records[kernel_->name];
  ++record.blocks;
  record.threads = threads_, record.shared_bytes = block.shared.size();
  for (const Warp& warp : block.warps) {
    record.all.add(warp.counts);
    record.longest.raise(warp.counts);
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
