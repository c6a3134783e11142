// Decodes PTX to instructions. Calls of device functions are inlined.

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "module.h"
#include "program.h"
#include "symbols.h"

namespace ptx {
namespace {

class Decoder {
 public:
  Decoder(const Module& module, Kernel& kernel)
      : module_(module), kernel_(kernel), symbols_(module, kernel) {}

  void decode(size_t line) {
    declare_parameters(line);
    decode_body(line);
    if (kernel_.code.empty() || kernel_.code.back().flow != Flow::kExit) {
      fail("missing ret");
    }
  }

 private:
  // Labels of a function that is being decoded, and branches to them.
  struct Function {
    std::map<std::string, int> labels;
    std::vector<std::pair<size_t, std::string>> branches; // (instruction, label)
  };
  static constexpr const char* kEnd = "$end"; // label after the last instruction

  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error(
        "tests/ptx cannot decode " + module_.name + ":" + std::to_string(line_) + ": " + why +
        ": " + statement_ + "; implement it in tests/ptx/*.cpp");
  }

  Operand operand(const std::string& text, int width) {
    std::optional<Operand> found = symbols_.operand(text, width);
    if (!found) {
      fail("unknown name or unexpected width: " + text);
    }
    return *found;
  }
  Operand output(const std::string& text, int width) {
    return text == "_" ? Operand{} : operand(text, width);
  }

  // ---- kernels and functions ----

  void declare_parameters(size_t line) {
    std::vector<Declaration> parameters;
    for (const std::string& text : module_.parameters_of(line)) {
      const Declaration& parameter = parameters.emplace_back(text);
      size_t begin = kernel_.parameters.empty() ? 0 : kernel_.parameters.back().end;
      begin = round_up(begin, parameter.align);
      kernel_.parameters.push_back({begin, begin + parameter.bytes});
    }
    kernel_.arguments.resize(parameters.empty() ? 0 : kernel_.parameters.back().end);
    for (size_t i = 0; i < parameters.size(); ++i) {
      const char* at = kernel_.arguments.data() + kernel_.parameters[i].begin;
      symbols_.declare_address(parameters[i].name, reinterpret_cast<uint64_t>(at));
    }
  }

  // ".loc 1 152 3, function_name L, inlined_at 1 9 3"
  void decode_location(const std::string& text) {
    auto describe = [&](const std::string& file_and_line) {
      std::istringstream stream(file_and_line);
      std::string file, line;
      stream >> file >> line;
      auto found = module_.files.find(file);
      return (found == module_.files.end() ? "?" : found->second) + ":" + line;
    };
    location_ = describe(text.substr(4));
    if (size_t at = text.find("inlined_at"); at != std::string::npos) {
      location_ += ", inlined at " + describe(text.substr(at + 10));
    }
  }

  void decode_body(size_t line) {
    functions_.emplace_back();
    symbols_.open_scope();
    std::string text = strip(module_.lines[line]);
    for (; text != "{"; text = strip(module_.lines[++line])) {
      if (text.starts_with(".maxntid")) {
        kernel_.max_threads = std::atoi(text.c_str() + std::strlen(".maxntid"));
      }
    }
    for (int depth = 1; depth > 0;) {
      text = strip(module_.lines[++line]);
      line_ = int(line) + 1;
      if (text.starts_with(".loc")) {
        decode_location(text);
      } else {
        depth += decode_line(text + " ");
      }
    }
    Function& function = functions_.back();
    function.labels[kEnd] = int(kernel_.code.size());
    for (const auto& [branch, label] : function.branches) {
      kernel_.code[branch].target = function.labels.at(label);
    }
    functions_.pop_back();
  }

  // Statements end with a semicolon, labels with a colon. Braces outside statements delimit scopes.
  // Returns the change of the scope depth.
  int decode_line(const std::string& text) {
    int depth = 0;
    for (char c : text) {
      if (statement_.empty() && c == '{') {
        symbols_.open_scope();
        ++depth;
      } else if (statement_.empty() && c == '}') {
        symbols_.close_scope();
        --depth;
      } else if (c == ';') {
        decode_statement();
        statement_.clear();
      } else if (c == ':' && statement_[0] == '$') {
        functions_.back().labels[statement_] = int(kernel_.code.size());
        statement_.clear();
      } else if (!statement_.empty() || !std::isspace(static_cast<unsigned char>(c))) {
        statement_ += std::isspace(static_cast<unsigned char>(c)) ? ' ' : c;
      }
    }
    return depth;
  }

  void decode_statement() {
    if (statement_.empty() || statement_.starts_with(".pragma")) {
      return;
    }
    if (statement_.starts_with(".reg")) {
      symbols_.declare_registers(statement_);
    } else if (statement_.starts_with(".shared")) {
      Declaration variable(statement_);
      symbols_.declare_address(variable.name, symbols_.allocate_shared(variable));
    } else if (statement_.starts_with(".param")) { // an argument or result of a call
      Declaration parameter(statement_);
      symbols_.declare_register(parameter.name, register_width(parameter.type));
    } else {
      decode_instruction();
    }
  }

  // ---- instructions ----

  struct Tokens {
    std::string opcode;
    Strings parts; // of the opcode: the base, modifiers and types
    Strings operands;

    bool has(const char* part) const { return std::ranges::find(parts, part) != parts.end(); }
    const std::string& type() const { return parts.back(); }
  };

  void decode_instruction() {
    Instruction i;
    std::string text = statement_;
    if (text[0] == '@') {
      size_t space = text.find(' ');
      i.inverts_guard = text[1] == '!';
      size_t first = i.inverts_guard ? 2 : 1;
      i.guard = operand(text.substr(first, space - first), 0);
      text = strip(text.substr(space));
    }
    size_t space = std::min(text.find(' '), text.size());
    Tokens tokens{text.substr(0, space), {}, split_operands(text.substr(space))};
    tokens.parts = split(tokens.opcode, '.');
    const std::string& base = tokens.parts[0];
    i.is_copy = base == "mov";
    if (base == "call") {
      return decode_call(i, tokens);
    }
    if (base == "bra") {
      branch(i, tokens.operands[0]);
    } else if (base == "ret" && functions_.size() > 1) {
      branch(i, kEnd);
    } else if (base == "ld" || base == "st") {
      decode_access(i, tokens);
    } else if (base == "atom" || base == "red") {
      decode_atomic(i, tokens);
    } else if (base == "mov" && statement_.find('{') != std::string::npos) {
      decode_vector_move(i, tokens);
    } else {
      decode_operation(i, tokens);
    }
    append(i);
  }

  void append(const Instruction& i) {
    kernel_.code.push_back(i);
    kernel_.sources.push_back({line_, location_, statement_});
    kernel_.executed.push_back(0);
  }

  void branch(Instruction& i, const std::string& label) {
    i.flow = Flow::kBranch;
    functions_.back().branches.emplace_back(kernel_.code.size(), label);
  }

  const Operation& set_operation(Instruction& i, const std::string& key) {
    const Operation* operation = find_operation(key);
    if (operation == nullptr) {
      fail("unknown instruction " + key);
    }
    i.run = operation->run, i.flow = operation->flow;
    return *operation;
  }

  // Decodes an output and inputs as the table lists them. The mask of a warp sync follows them, the
  // number of a barrier precedes them.
  void decode_operation(Instruction& i, const Tokens& tokens) {
    Strings operands = tokens.operands;
    bool is_wide = tokens.parts[0] == "cvt" && register_width(tokens.type()) == 4 &&
                   symbols_.width_of_register(operands[1]) == 8;
    const Operation& operation = set_operation(i, tokens.opcode + (is_wide ? ".8" : ""));
    if (i.flow == Flow::kWarpSync) {
      i.mask = operand(operands.back(), 4);
      operands.pop_back();
    } else if (i.flow == Flow::kBarrier) {
      auto number = operands.begin() + (operation.widths.empty() ? 0 : 1);
      if (*number != "0") {
        fail("barriers other than 0 are not implemented");
      }
      operands.erase(number);
    }
    if (operands.size() != operation.widths.size() && !operation.widths.empty()) {
      fail("unexpected number of operands");
    }
    for (size_t k = 0; k < operation.widths.size(); ++k) {
      if (k > 0) {
        i.in[k - 1] = operand(operands[k], operation.widths[k]);
      } else if (Strings outputs = split(operands[0], '|'); true) { // "%r1|%p2"
        i.out[0] = output(outputs[0], operation.widths[0]);
        i.out[1] = outputs.size() > 1 ? output(outputs[1], 0) : Operand{};
      }
    }
  }

  void decode_address(Instruction& i, const Tokens& tokens, const std::string& text) {
    i.space = tokens.has("shared") || tokens.has("shared::cta") ? Space::kShared
              : tokens.has("param")                             ? Space::kParameters
                                                                : Space::kGeneric;
    if (tokens.has("local") || tokens.has("const")) {
      fail("unknown state space");
    }
    std::string base = strip_brackets(text);
    if (size_t plus = base.find('+'); plus != std::string::npos) {
      i.displacement = std::strtoll(base.c_str() + plus + 1, nullptr, 0);
      base = base.substr(0, plus);
    }
    i.in[0] = operand(base, -1);
    i.has_wide_address = symbols_.width_of_register(base) != 4;
    i.is_strong = tokens.has("volatile") || tokens.has("relaxed") || tokens.has("acquire") ||
                  tokens.has("release") || tokens.has("acq_rel");
    i.acquires = tokens.has("acquire") || tokens.has("acq_rel");
    i.releases = tokens.has("release") || tokens.has("acq_rel");
    i.is_read_only = tokens.has("nc");
  }

  void decode_access(Instruction& i, const Tokens& tokens) {
    bool is_load = tokens.parts[0] == "ld";
    const std::string& address = tokens.operands[is_load ? 1 : 0];
    const std::string& value = tokens.operands[is_load ? 0 : 1];
    std::string base = strip_brackets(address).substr(0, strip_brackets(address).find('+'));
    if (SymbolTable::Symbol* symbol = symbols_.find(base);
        base[0] != '%' && symbol != nullptr && symbol->is_register) {
      // Arguments and results of inlined calls are registers.
      std::string to = is_load ? value : base, from = is_load ? base : value;
      int width = symbol->width;
      set_operation(i, width == 8 ? "mov.b64" : "mov.b32");
      i.is_copy = true;
      i.out[0] = operand(to, width), i.in[0] = operand(from, width);
      return;
    }
    decode_address(i, tokens, address);
    Strings values = value[0] == '{' ? split_operands(strip_brackets(value)) : Strings{value};
    i.count = uint8_t(values.size());
    int width = bytes_of(tokens.type()) == 8 ? 8 : 4;
    for (size_t k = 0; k < values.size(); ++k) {
      width = std::max(width, symbols_.width_of_register(values[k]));
      (is_load ? i.out[k] : i.in[k + 1]) = operand(values[k], -1);
    }
    set_operation(i, tokens.parts[0] + "." + tokens.type() + "." + std::to_string(width));
  }

  void decode_atomic(Instruction& i, const Tokens& tokens) {
    size_t first = tokens.parts[0] == "atom" ? 1 : 0; // red has no output
    decode_address(i, tokens, tokens.operands[first]);
    i.is_strong = !tokens.has("weak"); // only test_mutations.py emits weak atomics
    int width = register_width(tokens.type());
    i.out[0] = first > 0 ? output(tokens.operands[0], width) : Operand{};
    i.in[1] = operand(tokens.operands[first + 1], width);
    for (const char* name : {"add", "min", "max", "and", "or", "exch"}) {
      if (tokens.has(name)) {
        set_operation(i, std::string("atom.") + name + "." + tokens.type());
        return;
      }
    }
    fail("unknown atomic operation");
  }

  // "mov.b64 %rd1, {%r1, %r2}" or "mov.b64 {%r1, %r2}, %rd1"
  void decode_vector_move(Instruction& i, const Tokens& tokens) {
    bool packs = tokens.operands[1][0] == '{';
    Strings parts = split_operands(strip_brackets(tokens.operands[packs ? 1 : 0]));
    size_t bytes = bytes_of(tokens.type());
    i.count = uint8_t(parts.size());
    (packs ? i.out[0] : i.in[0]) =
        operand(tokens.operands[packs ? 0 : 1], register_width(tokens.type()));
    for (size_t k = 0; k < parts.size(); ++k) {
      (packs ? i.in[k] : i.out[k]) = output(parts[k], 4);
    }
    std::string widths = std::to_string(bytes / parts.size()) + "." + std::to_string(bytes);
    set_operation(i, (packs ? "pack." : "unpack.") + widths);
  }

  // Inlines "call (results), name, (arguments)".
  void decode_call(Instruction& i, const Tokens& tokens) {
    Strings names;
    std::string callee;
    for (const std::string& part : tokens.operands) {
      if (part[0] == '(') {
        Strings more = split_operands(strip_brackets(part));
        names.insert(names.end(), more.begin(), more.end());
      } else {
        callee = part;
      }
    }
    if (find_operation("call." + callee) != nullptr) {
      set_operation(i, "call." + callee);
      i.in[0] = operand(names[0], 8);
      return append(i);
    }
    auto found = module_.functions.find(callee);
    if (found == module_.functions.end() || i.guard) {
      fail("unknown function " + callee);
    }
    Strings parameters = module_.parameters_of(found->second);
    symbols_.open_scope();
    for (size_t k = 0; k < parameters.size(); ++k) {
      symbols_.declare(Declaration(parameters[k]).name, *symbols_.find(names[k]));
    }
    auto caller = std::make_tuple(line_, location_, statement_);
    statement_.clear();
    decode_body(found->second);
    std::tie(line_, location_, statement_) = caller;
    symbols_.close_scope();
  }

  const Module& module_;
  Kernel& kernel_;
  SymbolTable symbols_;
  std::vector<Function> functions_; // stack of inlined calls
  int line_ = 0;
  std::string location_, statement_;
};

} // namespace

Program::Program(const std::string& path) : module_(std::make_unique<Module>(path)) {}
Program::~Program() = default;

bool Program::has(const std::string& kernel) const { return module_->functions.contains(kernel); }

Kernel& Program::find(const std::string& name) {
  std::unique_ptr<Kernel>& kernel = kernels_[name];
  if (kernel == nullptr) {
    auto decoded = std::make_unique<Kernel>();
    decoded->name = name, decoded->file = module_->name;
    Decoder(*module_, *decoded).decode(module_->functions.at(name));
    kernel = std::move(decoded);
  }
  return *kernel;
}

} // namespace ptx
