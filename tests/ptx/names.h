// What names stand for in the body of a kernel: registers, constants, and places in memory.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "program.h"
#include "text.h"

namespace ptx {

class Names {
 public:
  // A register, or a place in memory.
  struct Symbol {
    bool is_register;
    Operand place;
    int width; // bytes per lane
    uint64_t address;
  };

  Names(const Text& text, Kernel& kernel) : text_(text), kernel_(kernel) { open(); }

  void open() { scopes_.emplace_back(); }
  void close() { scopes_.pop_back(); }
  void declare_register(const std::string& name, int width);
  void declare_registers(const std::string& text); // ".reg .b32 %r<12>", ".reg .b32 low, high"
  uint64_t allocate_shared(const Declaration& variable); // returns its address
  void declare_address(const std::string& name, uint64_t address);
  void declare_same(const std::string& name, const Symbol& symbol);

  Symbol* find(const std::string& name);
  int width_of_register(const std::string& name); // 0 for everything else
  // `width`: bytes per lane that are expected, -1 for any. Nothing for a name that is not known, or of
  // another width.
  std::optional<Operand> operand(const std::string& text, int width);

 private:
  struct Scope {
    std::unordered_map<std::string, Symbol> symbols;
    std::map<std::string, int> families; // "%r": the width of %r1, %r2 and so on
  };

  Operand allocate(int width);
  Operand constant(uint64_t value);

  const Text& text_;
  Kernel& kernel_;
  std::vector<Scope> scopes_;
  std::map<uint64_t, int> constants_;
};

} // namespace ptx
