#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "fiber.h"

// Where include/cuda_runtime.h puts __shared__ variables: the linker names both ends. This one keeps
// the section from being empty.
__attribute__((section("emulated_shared"), used)) static char first_shared[64];
extern "C" char __start_emulated_shared[], __stop_emulated_shared[];

namespace emulation {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 << 10;

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Thread {
  std::unique_ptr<Fiber> fiber;
  State state;
  uint3 index;
  // What it waits with, and what it gets.
  Site site;
  uint32_t mask;
  uint64_t value;
  int source;
  Met met;
  int met_count;
};

struct Emulator {
  std::vector<Thread> threads; // as many as the largest block so far
  int size = 0;                // of the block that runs
  int current = 0;
  const std::function<void()>* body = nullptr;
  std::vector<char> shared;
  unsigned schedule = 0;
  std::mt19937 random;
  bool failed = false;
  Error error = Error::kNone;
  std::string message = "no error";
};

Emulator emulator;
std::mutex mutex; // launches of different host threads take turns

void stop_with(Error error, const std::string& message) {
  emulator.failed = true;
  emulator.error = error;
  emulator.message = message;
}

// Into some other order where a schedule is set: correct kernels do not depend on it.
void shuffle(std::vector<int>& indices) {
  if (emulator.schedule != 0) {
    std::shuffle(indices.begin(), indices.end(), emulator.random);
  }
}

std::vector<int> order(int count) {
  std::vector<int> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  shuffle(indices);
  return indices;
}

std::string describe(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}

// "32 threads wait at assign.cu:12, 224 have exited"
std::string describe_threads() {
  std::map<std::string, int> places;
  for (int i = 0; i < emulator.size; ++i) {
    const Thread& thread = emulator.threads[i];
    ++places[thread.state == State::kDone ? "have exited" : "wait at " + describe(thread.site)];
  }
  std::string out;
  for (const auto& [place, count] : places) {
    out += (out.empty() ? "" : ", ") + std::to_string(count) + " threads " + place;
  }
  return out;
}

void wait(State state, Site site) {
  Thread& self = emulator.threads[emulator.current];
  self.state = state;
  self.site = site;
  Fiber::yield();
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Lets a warp go on whose lanes of one mask have all come to the same place.
void release_lanes(int first, uint32_t mask, const Site& site) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) {
      if (first + lane >= emulator.size) {
        return;
      }
      const Thread& thread = emulator.threads[first + lane];
      if (thread.state != State::kAtWarp || thread.mask != mask || !same_place(thread.site, site)) {
        return;
      }
    }
  }
  uint32_t nonzero = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) {
      nonzero |= uint32_t(emulator.threads[first + lane].value != 0) << lane;
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) {
      Thread& thread = emulator.threads[first + lane];
      bool given = mask >> thread.source & 1;
      // What a lane outside the mask would give is undefined.
      thread.met = {given ? emulator.threads[first + thread.source].value : ~0ull, nonzero};
      thread.state = State::kReady;
    }
  }
}

// The threads of a warp that can run.
std::vector<int> ready_threads(int warp) {
  std::vector<int> ready;
  int first = warp * kWarpSize, last = std::min(first + kWarpSize, emulator.size);
  for (int i = first; i < last; ++i) {
    const Thread& thread = emulator.threads[i];
    if (thread.state == State::kAtWarp) {
      release_lanes(first, thread.mask, Site(thread.site));
    }
  }
  for (int i = first; i < last; ++i) {
    if (emulator.threads[i].state == State::kReady) {
      ready.push_back(i);
    }
  }
  return ready;
}

bool release_block() {
  int flags = 0;
  for (int i = 0; i < emulator.size; ++i) {
    const Thread& thread = emulator.threads[i];
    if (thread.state != State::kAtBlock || !same_place(thread.site, emulator.threads[0].site)) {
      return false;
    }
    flags += thread.value != 0;
  }
  for (int i = 0; i < emulator.size; ++i) {
    emulator.threads[i].met_count = flags;
    emulator.threads[i].state = State::kReady;
  }
  return true;
}

// All shared memory of the library starts as garbage in every block. The space between variables
// belongs to AddressSanitizer: it checks accesses, not what lies there, and must not check this one.
__attribute__((no_sanitize("address"), noinline)) void spoil_shared() {
  for (char* at = __start_emulated_shared; at != __stop_emulated_shared; ++at) {
    *reinterpret_cast<volatile char*>(at) = char(0xff);
  }
  for (char& at : emulator.shared) {
    at = char(0xff);
  }
}

void run_thread() {
  (*emulator.body)();
  emulator.threads[emulator.current].state = State::kDone;
}

void abandon_threads() {
  for (Thread& thread : emulator.threads) {
    thread.fiber->reset();
  }
}

// Runs threads that can run; false if there are none. Where a schedule is set some warps have to
// wait, so that others run ahead of them, as far as the next barrier of the block.
bool take_turns() {
  std::vector<int> chosen;
  for (int warp : order((emulator.size + kWarpSize - 1) / kWarpSize)) {
    std::vector<int> ready = ready_threads(warp);
    chosen.insert(chosen.end(), ready.begin(), ready.end());
    if (!ready.empty() && emulator.schedule != 0 && emulator.random() % 2 == 0) {
      break;
    }
  }
  shuffle(chosen);
  for (int i : chosen) {
    emulator.current = i;
    threadIdx = emulator.threads[i].index;
    emulator.threads[i].fiber->resume();
    if (emulator.failed) {
      break;
    }
  }
  return !chosen.empty();
}

void run_block() {
  spoil_shared();
  for (int i = 0; i < emulator.size; ++i) {
    emulator.threads[i].state = State::kReady;
  }
  auto done = [](const Thread& thread) { return thread.state == State::kDone; };
  auto first = emulator.threads.begin(), last = first + emulator.size;
  while (!emulator.failed && !std::all_of(first, last, done)) {
    if (!take_turns() && !release_block()) {
      stop_with(Error::kLaunchFailure, "divergent barrier: " + describe_threads());
    }
  }
  if (emulator.failed) {
    abandon_threads();
  }
}

void prepare(dim3 block, size_t shared_bytes) {
  emulator.failed = false;
  emulator.size = int(block.x * block.y * block.z);
  while (int(emulator.threads.size()) < emulator.size) {
    emulator.threads.emplace_back().fiber = std::make_unique<Fiber>(run_thread);
  }
  for (int i = 0; i < emulator.size; ++i) {
    unsigned index = unsigned(i);
    emulator.threads[i].index = {
        index % block.x, index / block.x % block.y, index / block.x / block.y};
  }
  emulator.shared = std::vector<char>(shared_bytes); // a new one: exactly as large as asked for
}

} // namespace

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  std::lock_guard<std::mutex> lock(mutex);
  uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > kMaxThreads || shared_bytes > kMaxSharedBytes) {
    stop_with(Error::kInvalidConfiguration, "invalid configuration argument");
    return;
  }
  prepare(block, shared_bytes);
  emulator.body = &thread;
  gridDim = grid;
  blockDim = block;
  const std::vector<int> sequence = order(int(blocks));
  for (size_t i = 0; i < sequence.size() && !emulator.failed; ++i) {
    unsigned index = unsigned(sequence[i]);
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    run_block();
  }
}

int meet_block(bool flag, Site site) {
  Thread& self = emulator.threads[emulator.current];
  self.value = flag;
  wait(State::kAtBlock, site);
  return self.met_count;
}

Met meet_warp(uint32_t mask, uint64_t value, int source, Site site) {
  if (!(mask >> lane() & 1)) {
    fail("a lane outside its own mask at " + describe(site));
  }
  Thread& self = emulator.threads[emulator.current];
  self.mask = mask;
  self.value = value;
  self.source = source;
  wait(State::kAtWarp, site);
  return self.met;
}

int lane() { return emulator.current % kWarpSize; }

void* dynamic_shared() { return emulator.shared.data(); }

void fail(const std::string& message) {
  stop_with(Error::kAssert, message);
  for (;;) {
    Fiber::yield(); // and is never resumed
  }
}

Error last_error(bool clear) {
  Error error = emulator.error;
  if (clear) {
    emulator.error = Error::kNone;
  }
  return error;
}

const char* last_message() { return emulator.message.c_str(); }

} // namespace emulation

// For tests: 0 runs blocks and threads in order; any other number stands for a sequence of orders,
// of which every launch takes new ones.
extern "C" void emulation_set_schedule(unsigned schedule) {
  emulation::emulator.schedule = schedule;
  emulation::emulator.random.seed(schedule);
}
