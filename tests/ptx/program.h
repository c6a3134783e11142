// Decoded kernels: instructions with resolved operands, and everything needed to launch them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

constexpr int kLanes = 32; // per warp
constexpr uint32_t kAllLanes = ~0u;

struct Warp;
struct Instruction;
struct Module;

// Executes an instruction for a mask of lanes.
using Handler = void (*)(Warp&, const Instruction&, uint32_t lanes);

// Offset of a register or constant in the warp's storage, which holds one value per lane: 8 bytes
// for 64-bit types, 4 bytes for all others. A predicate is one word with a bit per lane.
struct Operand {
  int offset = -1;
  bool is_constant = false;

  explicit operator bool() const { return offset >= 0; }
};

enum class Flow : uint8_t {
  kNext,
  kBranch,
  kExit,
  kBarrier,  // waits for all threads of the block
  kWarpSync, // waits for all lanes in a mask
};
enum class Space : uint8_t { kGeneric, kShared, kParameters };

struct Instruction {
  Handler run = nullptr;
  Flow flow = Flow::kNext;
  Space space = Space::kGeneric;
  bool is_strong = false; // volatile, relaxed or atomic (PTX memory model)
  bool acquires = false, releases = false;
  bool has_wide_address = true; // 64-bit
  bool is_read_only = false;    // ld.global.nc: the memory must be constant during the kernel
  bool inverts_guard = false;
  bool is_copy = false; // register to register
  uint8_t count = 1;    // vector elements
  Operand guard, mask;
  Operand out[4], in[5];
  int target = -1;          // of a branch
  int64_t displacement = 0; // of an address
};

// The source of an instruction, for messages.
struct Source {
  int line = 0;         // in the PTX file
  std::string location; // "select_candidates.cu:436, inlined at ...", or empty
  std::string text;
};

struct Range {
  size_t begin, end;
};

struct Kernel {
  std::string name, file;
  std::vector<Instruction> code;
  std::vector<Source> sources;   // by instruction
  std::vector<uint8_t> executed; // by instruction
  size_t register_bytes = 0;     // per warp
  std::vector<char> constants;
  std::vector<Range> parameters;                   // ranges of `arguments`
  std::vector<char> arguments;                     // never reallocated: code holds its address
  std::vector<const std::vector<char>*> variables; // .global variables that the kernel uses
  std::vector<Range> shared;                       // static shared variables
  size_t shared_bytes = 0;
  int max_threads = 1024;                                     // per block
  std::unordered_map<std::string, Operand> special_registers; // "%tid.x", ...
};

// The kernels of a PTX file, decoded on first use.
class Program {
 public:
  explicit Program(const std::string& path);
  ~Program();
  bool has(const std::string& kernel) const;
  Kernel& find(const std::string& kernel);

 private:
  std::unique_ptr<Module> module_;
  std::map<std::string, std::unique_ptr<Kernel>> kernels_;
};

// How an opcode executes. `widths` are the bytes per lane (4, 8, or 0 for a predicate) of the
// output, followed by those of the inputs; empty if the decoder handles the operands itself.
struct Operation {
  Handler run = nullptr;
  Flow flow = Flow::kNext;
  std::vector<int> widths;
};
using Table = std::unordered_map<std::string, Operation>;

void add_arithmetic(Table& table);
void add_conversions(Table& table);
// Looks up an opcode such as "add.f32"; returns null if it is not implemented.
const Operation* find_operation(const std::string& opcode);

} // namespace ptx
