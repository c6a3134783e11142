#include "symbols.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <sstream>

namespace ptx {
namespace {

constexpr size_t kRedzone = 64; // bytes between shared variables, to detect overflows
constexpr size_t kConstantBytes = kLanes * (4 + 8);

bool is_number(const std::string& text) {
  return std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-';
}

uint64_t parse_number(const std::string& text) {
  if (text.size() > 2 && text[0] == '0' && std::strchr("fFdD", text[1])) { // IEEE 754 bits
    return std::strtoull(text.c_str() + 2, nullptr, 16);
  }
  return text[0] == '-' ? uint64_t(std::strtoll(text.c_str(), nullptr, 0))
                        : std::strtoull(text.c_str(), nullptr, 0);
}

} // namespace

Operand SymbolTable::allocate_register(int width) {
  Operand out{int(kernel_.register_bytes), false};
  kernel_.register_bytes += width == 0 ? 8 : size_t(width) * kLanes;
  return out;
}

// Stores the value for each lane, first in 32 bits, then in 64 bits.
Operand SymbolTable::allocate_constant(uint64_t value) {
  auto [found, is_new] = constants_.emplace(value, int(kernel_.constants.size()));
  if (is_new) {
    kernel_.constants.resize(kernel_.constants.size() + kConstantBytes);
    char* at = kernel_.constants.data() + found->second;
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(at + 4 * lane, &value, 4);
      std::memcpy(at + 4 * kLanes + 8 * lane, &value, 8);
    }
  }
  return {found->second, true};
}

void SymbolTable::declare_register(const std::string& name, int width) {
  declare(name, {true, allocate_register(width), width, 0});
}

void SymbolTable::declare_registers(const std::string& text) {
  std::istringstream stream(text);
  std::string reg, type, names;
  stream >> reg >> type;
  std::getline(stream, names);
  int width = register_width(type.substr(1));
  for (const std::string& name : split_operands(names)) {
    if (size_t bracket = name.find('<'); bracket != std::string::npos) {
      scopes_.back().families[name.substr(0, bracket)] = width;
    } else {
      declare_register(name, width);
    }
  }
}

uint64_t SymbolTable::allocate_shared(const Declaration& variable) {
  size_t begin = round_up(kernel_.shared_bytes, std::max<size_t>(variable.align, 16));
  kernel_.shared.push_back({begin, begin + variable.bytes});
  kernel_.shared_bytes = round_up(begin + variable.bytes, 16) + kRedzone;
  return begin;
}

void SymbolTable::declare_address(const std::string& name, uint64_t address) {
  declare(name, {false, {}, 8, address});
}

void SymbolTable::declare(const std::string& name, const Symbol& symbol) {
  scopes_.back().symbols[name] = symbol;
}

SymbolTable::Symbol* SymbolTable::find(const std::string& name) {
  std::string family = name.substr(0, name.find_last_not_of("0123456789") + 1);
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    if (auto found = scope->symbols.find(name); found != scope->symbols.end()) {
      return &found->second;
    }
    if (auto found = scope->families.find(family); found != scope->families.end()) {
      return &(scope->symbols[name] = {true, allocate_register(found->second), found->second, 0});
    }
  }
  Symbol symbol{false, {}, 8, kernel_.shared_bytes};
  if (auto found = module_.variables.find(name); found != module_.variables.end()) {
    kernel_.variables.push_back(&found->second);
    symbol.address = reinterpret_cast<uint64_t>(found->second.data());
  } else if (name[0] == '%') { // "%tid.x"
    symbol = {true, allocate_register(4), 4, 0};
    kernel_.special_registers[name] = symbol.operand;
  } else if (auto found = module_.shared.find(name); found != module_.shared.end()) {
    symbol.address = allocate_shared(found->second);
  } else if (!module_.dynamic_shared.contains(name)) {
    return nullptr;
  }
  return &(scopes_.front().symbols[name] = symbol);
}

int SymbolTable::width_of_register(const std::string& name) {
  Symbol* symbol = is_number(name) ? nullptr : find(name);
  return symbol != nullptr && symbol->is_register ? symbol->width : 0;
}

std::optional<Operand> SymbolTable::operand(const std::string& text, int width) {
  if (is_number(text)) {
    uint64_t value = parse_number(text);
    return allocate_constant(width == 0 && value != 0 ? ~uint64_t(0) : value);
  }
  Symbol* symbol = find(text);
  if (symbol == nullptr || (symbol->is_register && width >= 0 && symbol->width != width)) {
    return std::nullopt;
  }
  return symbol->is_register ? symbol->operand : allocate_constant(symbol->address);
}

} // namespace ptx
