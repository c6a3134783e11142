// A kernel of a PTX file, decoded: instructions whose operands are places in a warp's registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

constexpr int kLanes = 32; // of a warp
constexpr uint32_t kAllLanes = ~0u;

struct Warp;
struct Instruction;
struct Text;

// Does what an instruction says for these lanes of a warp.
using Handler = void (*)(Warp&, const Instruction&, uint32_t lanes);

// A register, or a constant: where its 32 lanes begin. Registers and constants of 64 bits have eight
// bytes per lane, all others four; a predicate is one word with a bit per lane.
struct Operand {
  int offset = -1;
  bool is_constant = false;

  explicit operator bool() const { return offset >= 0; }
};

enum class Flow : uint8_t {
  kNext,
  kBranch,
  kExit,
  kBarrier, // of the block
  kMeeting, // of the lanes in a mask
};
enum class Space : uint8_t { kGeneric, kShared, kParameters };

struct Instruction {
  Handler run = nullptr;
  Flow flow = Flow::kNext;
  Space space = Space::kGeneric;
  bool is_strong = false; // volatile, relaxed, or atomic: other threads may access at the same time
  bool acquires = false, releases = false;
  bool has_wide_address = true; // of 64 bits
  bool is_read_only = false;    // promises that nobody writes there while the kernel runs
  bool inverts_guard = false;
  bool is_copy = false; // of registers
  uint8_t count = 1;    // of numbers in a vector
  Operand guard, mask;
  Operand out[4], in[5];
  int target = -1;
  int64_t displacement = 0; // of an address
};

// Where an instruction stands, for messages.
struct Source {
  int line = 0;         // of the PTX file
  std::string location; // "select_candidates.cu:436, inlined at ..."; empty if unknown
  std::string text;
};

struct Range {
  size_t begin, end;
};

struct Kernel {
  std::string name, file;
  std::vector<Instruction> code;
  std::vector<Source> sources;   // of the instructions
  std::vector<uint8_t> executed; // whether each was
  size_t register_bytes = 0;     // of a warp
  std::vector<char> constants;
  std::vector<Range> parameters;                   // in `arguments`
  std::vector<char> arguments;                     // whose address does not change
  std::vector<const std::vector<char>*> variables; // of the file, in global memory
  std::vector<Range> shared;                       // variables of a block
  size_t shared_bytes = 0;
  int max_threads = 1024; // of a block
  // Registers that are set before the first instruction: "%tid.x" and the like.
  std::unordered_map<std::string, Operand> special_registers;
};

// All kernels of a file; each is decoded when it is first asked for.
class Program {
 public:
  explicit Program(const std::string& path);
  ~Program();
  bool has(const std::string& kernel) const;
  Kernel& find(const std::string& kernel);

 private:
  std::unique_ptr<Text> text_;
  std::map<std::string, std::unique_ptr<Kernel>> kernels_;
};

// What an opcode does. The number of bytes per lane of the output, and of the inputs: 4 or 8, 0 for
// a predicate; none where the decoder knows better.
struct Operation {
  Handler run = nullptr;
  Flow flow = Flow::kNext;
  std::vector<int> widths;
};
using Table = std::unordered_map<std::string, Operation>;

void add_arithmetic(Table& table);
void add_conversions(Table& table);
// "add.f32"; null for an unknown one.
const Operation* find_operation(const std::string& opcode);

} // namespace ptx
