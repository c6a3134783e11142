#include "names.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <sstream>

namespace ptx {
namespace {

constexpr size_t kGap = 64; // between variables in shared memory: what is there belongs to none
constexpr size_t kBytesOfConstant = kLanes * (4 + 8);

size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

bool is_number(const std::string& text) {
  return std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-';
}

uint64_t parse_number(const std::string& text) {
  if (text.size() > 2 && text[0] == '0' && std::strchr("fFdD", text[1])) { // the bits of a float
    return std::strtoull(text.c_str() + 2, nullptr, 16);
  }
  return text[0] == '-' ? uint64_t(std::strtoll(text.c_str(), nullptr, 0))
                        : std::strtoull(text.c_str(), nullptr, 0);
}

} // namespace

Operand Names::allocate(int width) {
  Operand out{int(kernel_.register_bytes), false};
  kernel_.register_bytes += width == 0 ? 8 : size_t(width) * kLanes;
  return out;
}

// For 32 lanes, as a number of 32 bits and as one of 64.
Operand Names::constant(uint64_t value) {
  auto [found, is_new] = constants_.emplace(value, int(kernel_.constants.size()));
  if (is_new) {
    kernel_.constants.resize(kernel_.constants.size() + kBytesOfConstant);
    char* at = kernel_.constants.data() + found->second;
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(at + 4 * lane, &value, 4);
      std::memcpy(at + 4 * kLanes + 8 * lane, &value, 8);
    }
  }
  return {found->second, true};
}

void Names::declare_register(const std::string& name, int width) {
  declare_same(name, {true, allocate(width), width, 0});
}

void Names::declare_registers(const std::string& text) {
  std::istringstream stream(text);
  std::string reg, type, names;
  stream >> reg >> type;
  std::getline(stream, names);
  int width = width_of(type.substr(1));
  for (const std::string& name : split_operands(names)) {
    if (size_t bracket = name.find('<'); bracket != std::string::npos) {
      scopes_.back().families[name.substr(0, bracket)] = width;
    } else {
      declare_register(name, width);
    }
  }
}

uint64_t Names::allocate_shared(const Declaration& variable) {
  size_t begin = round_up(kernel_.shared_bytes, std::max<size_t>(variable.align, 16));
  kernel_.shared.push_back({begin, begin + variable.bytes});
  kernel_.shared_bytes = round_up(begin + variable.bytes, 16) + kGap;
  return begin;
}

void Names::declare_address(const std::string& name, uint64_t address) {
  declare_same(name, {false, {}, 8, address});
}

void Names::declare_same(const std::string& name, const Symbol& symbol) {
  scopes_.back().symbols[name] = symbol;
}

Names::Symbol* Names::find(const std::string& name) {
  std::string family = name.substr(0, name.find_last_not_of("0123456789") + 1);
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    if (auto found = scope->symbols.find(name); found != scope->symbols.end()) {
      return &found->second;
    }
    if (auto found = scope->families.find(family); found != scope->families.end()) {
      return &(scope->symbols[name] = {true, allocate(found->second), found->second, 0});
    }
  }
  Symbol symbol{false, {}, 8, kernel_.shared_bytes};
  if (auto found = text_.variables.find(name); found != text_.variables.end()) {
    kernel_.variables.push_back(&found->second);
    symbol.address = reinterpret_cast<uint64_t>(found->second.data());
  } else if (name[0] == '%') { // "%tid.x"
    symbol = {true, allocate(4), 4, 0};
    kernel_.special_registers[name] = symbol.place;
  } else if (auto found = text_.shared.find(name); found != text_.shared.end()) {
    symbol.address = allocate_shared(found->second);
  } else if (!text_.dynamic_shared.count(name)) {
    return nullptr;
  }
  return &(scopes_.front().symbols[name] = symbol);
}

int Names::width_of_register(const std::string& name) {
  Symbol* symbol = is_number(name) ? nullptr : find(name);
  return symbol != nullptr && symbol->is_register ? symbol->width : 0;
}

std::optional<Operand> Names::operand(const std::string& text, int width) {
  if (is_number(text)) {
    uint64_t value = parse_number(text);
    return constant(width == 0 && value != 0 ? ~uint64_t(0) : value);
  }
  Symbol* symbol = find(text);
  if (symbol == nullptr || (symbol->is_register && width >= 0 && symbol->width != width)) {
    return std::nullopt;
  }
  return symbol->is_register ? symbol->place : constant(symbol->address);
}

} // namespace ptx
