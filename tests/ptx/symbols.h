// Symbol table of a kernel: resolves identifiers and literals to operands.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "module.h"
#include "program.h"

namespace ptx {

class SymbolTable {
 public:
  // A register or an address.
  struct Symbol {
    bool is_register;
    Operand operand; // of a register
    int width;       // bytes per lane
    uint64_t address;
  };

  SymbolTable(const Module& module, Kernel& kernel) : module_(module), kernel_(kernel) {
    open_scope();
  }

  void open_scope() { scopes_.emplace_back(); }
  void close_scope() { scopes_.pop_back(); }
  void declare(const std::string& name, const Symbol& symbol);
  void declare_register(const std::string& name, int width);
  void declare_registers(const std::string& text); // ".reg .b32 %r<12>", ".reg .b32 low, high"
  void declare_address(const std::string& name, uint64_t address);
  uint64_t allocate_shared(const Declaration& variable); // returns its address

  Symbol* find(const std::string& name);
  int width_of_register(const std::string& name); // 0 if it is not a register
  // Resolves an identifier or literal. `width` is the expected number of bytes per lane, or -1 for
  // any. Returns nullopt if the name is unknown or has another width.
  std::optional<Operand> operand(const std::string& text, int width);

 private:
  struct Scope {
    std::unordered_map<std::string, Symbol> symbols;
    std::map<std::string, int> families; // ".reg .b32 %r<12>" -> {"%r", 4}
  };

  Operand allocate_register(int width);
  Operand allocate_constant(uint64_t value);

  const Module& module_;
  Kernel& kernel_;
  std::vector<Scope> scopes_;
  std::map<uint64_t, int> constants_; // offsets by value
};

} // namespace ptx
