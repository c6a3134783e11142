// From PTX to instructions. Functions that a kernel calls are put in the place of the call.

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <tuple>

#include "names.h"
#include "program.h"
#include "text.h"

namespace ptx {
namespace {

size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

class Decoder {
 public:
  Decoder(const Text& text, Kernel& kernel) : text_(text), kernel_(kernel), names_(text, kernel) {}

  void decode(size_t line) {
    declare_parameters(line);
    read_body(line);
    if (kernel_.code.empty() || kernel_.code.back().flow != Flow::kExit) {
      refuse("the kernel has no end");
    }
  }

 private:
  // A function whose body is being read.
  struct Function {
    std::map<std::string, int> labels;
    std::vector<std::pair<size_t, std::string>> jumps; // instructions, and where to
  };
  static constexpr const char* kEnd = "end of the function";

  [[noreturn]] void refuse(const std::string& why) const {
    throw std::runtime_error(
        "tests/ptx cannot decode " + text_.name + ":" + std::to_string(line_) + ": " + why + ": " +
        statement_ + "; teach it in tests/ptx/*.cpp");
  }

  Operand operand(const std::string& text, int width) {
    std::optional<Operand> found = names_.operand(text, width);
    if (!found) {
      refuse("unknown name, or another width than expected: " + text);
    }
    return *found;
  }
  Operand output(const std::string& text, int width) {
    return text == "_" ? Operand{} : operand(text, width);
  }

  // ---- the frame of a kernel ----

  void declare_parameters(size_t line) {
    std::vector<Declaration> parameters;
    for (const std::string& text : text_.parameters_of(line)) {
      const Declaration& parameter = parameters.emplace_back(text);
      size_t begin = kernel_.parameters.empty() ? 0 : kernel_.parameters.back().end;
      begin = round_up(begin, parameter.align);
      kernel_.parameters.push_back({begin, begin + parameter.bytes});
    }
    kernel_.arguments.resize(parameters.empty() ? 0 : kernel_.parameters.back().end);
    for (size_t i = 0; i < parameters.size(); ++i) {
      const char* at = kernel_.arguments.data() + kernel_.parameters[i].begin;
      names_.declare_address(parameters[i].name, reinterpret_cast<uint64_t>(at));
    }
  }

  void note_location(const std::string& text) { // ".loc 1 152 3, function_name L, inlined_at 1 9 3"
    auto describe = [&](const std::string& place) {
      std::istringstream stream(place);
      std::string file, line;
      stream >> file >> line;
      auto found = text_.files.find(file);
      return (found == text_.files.end() ? "?" : found->second) + ":" + line;
    };
    location_ = describe(text.substr(4));
    if (size_t at = text.find("inlined_at"); at != std::string::npos) {
      location_ += ", inlined at " + describe(text.substr(at + 10));
    }
  }

  // ---- bodies ----

  void read_body(size_t line) {
    functions_.emplace_back();
    names_.open();
    std::string text = strip(text_.lines[line]);
    for (; text != "{"; text = strip(text_.lines[++line])) {
      if (starts_with(text, ".maxntid")) {
        kernel_.max_threads = std::atoi(text.c_str() + std::strlen(".maxntid"));
      }
    }
    for (int depth = 1; depth > 0;) {
      text = strip(text_.lines[++line]);
      line_ = int(line) + 1;
      if (starts_with(text, ".loc")) {
        note_location(text);
      } else {
        depth += read_line(text + " ");
      }
    }
    Function& function = functions_.back();
    function.labels[kEnd] = int(kernel_.code.size());
    for (const auto& [jump, label] : function.jumps) {
      kernel_.code[jump].target = function.labels.at(label);
    }
    functions_.pop_back();
  }

  // Statements end with a semicolon, labels with a colon. A brace opens or closes a scope unless it is
  // inside a statement. Returns how many more scopes are open.
  int read_line(const std::string& text) {
    int opened = 0;
    for (char c : text) {
      if (statement_.empty() && c == '{') {
        names_.open();
        ++opened;
      } else if (statement_.empty() && c == '}') {
        names_.close();
        --opened;
      } else if (c == ';') {
        read_statement();
        statement_.clear();
      } else if (c == ':' && statement_[0] == '$') {
        functions_.back().labels[statement_] = int(kernel_.code.size());
        statement_.clear();
      } else if (!statement_.empty() || !std::isspace(static_cast<unsigned char>(c))) {
        statement_ += std::isspace(static_cast<unsigned char>(c)) ? ' ' : c;
      }
    }
    return opened;
  }

  void read_statement() {
    if (statement_.empty() || starts_with(statement_, ".pragma")) {
      return;
    }
    if (starts_with(statement_, ".reg")) {
      names_.declare_registers(statement_);
    } else if (starts_with(statement_, ".shared")) {
      Declaration variable(statement_);
      names_.declare_address(variable.name, names_.allocate_shared(variable));
    } else if (starts_with(statement_, ".param")) { // of a call
      Declaration parameter(statement_);
      names_.declare_register(parameter.name, width_of(parameter.type));
    } else {
      read_instruction();
    }
  }

  // ---- instructions ----

  // An instruction, cut to pieces.
  struct Words {
    std::string opcode;
    Strings parts; // of the opcode
    Strings operands;

    bool has(const char* part) const {
      return std::find(parts.begin(), parts.end(), part) != parts.end();
    }
    const std::string& type() const { return parts.back(); }
  };

  void read_instruction() {
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
    Words words{text.substr(0, space), {}, split_operands(text.substr(space))};
    words.parts = split(words.opcode, '.');
    const std::string& base = words.parts[0];
    i.is_copy = base == "mov";
    if (base == "call") {
      return read_call(i, words);
    }
    if (base == "bra") {
      jump(i, words.operands[0]);
    } else if (base == "ret" && functions_.size() > 1) {
      jump(i, kEnd);
    } else if (base == "ld" || base == "st") {
      read_access(i, words);
    } else if (base == "atom" || base == "red") {
      read_atomic(i, words);
    } else if (base == "mov" && words.operands[0][0] == '{') {
      read_unpacking(i, words);
    } else if (base == "mov" && words.operands[1][0] == '{') {
      read_packing(i, words);
    } else {
      read_operation(i, words);
    }
    append(i);
  }

  void append(const Instruction& i) {
    kernel_.code.push_back(i);
    kernel_.sources.push_back({line_, location_, statement_});
    kernel_.executed.push_back(0);
  }

  void jump(Instruction& i, const std::string& label) {
    i.flow = Flow::kBranch;
    functions_.back().jumps.emplace_back(kernel_.code.size(), label);
  }

  const Operation& choose(Instruction& i, const std::string& key) {
    const Operation* operation = find_operation(key);
    if (operation == nullptr) {
      refuse("unknown instruction " + key);
    }
    i.run = operation->run, i.flow = operation->flow;
    return *operation;
  }

  // An output and inputs, as many as the table says. Behind them is the mask of lanes that meet, before
  // them the number of a barrier.
  void read_operation(Instruction& i, const Words& words) {
    Strings operands = words.operands;
    bool is_wide = words.parts[0] == "cvt" && width_of(words.type()) == 4 &&
                   names_.width_of_register(operands[1]) == 8;
    const Operation& operation = choose(i, words.opcode + (is_wide ? ".8" : ""));
    if (i.flow == Flow::kMeeting) {
      i.mask = operand(operands.back(), 4);
      operands.pop_back();
    } else if (i.flow == Flow::kBarrier) {
      auto number = operands.begin() + (operation.widths.empty() ? 0 : 1);
      if (*number != "0") {
        refuse("barriers other than 0 are unknown");
      }
      operands.erase(number);
    }
    if (operands.size() != operation.widths.size() && !operation.widths.empty()) {
      refuse("unknown number of operands");
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

  void read_address(Instruction& i, const Words& words, const std::string& text) {
    i.space = words.has("shared") || words.has("shared::cta") ? Space::kShared
              : words.has("param")                            ? Space::kParameters
                                                              : Space::kGeneric;
    if (words.has("local") || words.has("const")) {
      refuse("unknown memory");
    }
    std::string base = without_brackets(text);
    if (size_t plus = base.find('+'); plus != std::string::npos) {
      i.displacement = std::strtoll(base.c_str() + plus + 1, nullptr, 0);
      base = base.substr(0, plus);
    }
    i.in[0] = operand(base, -1);
    i.has_wide_address = names_.width_of_register(base) != 4;
    i.is_strong = words.has("volatile") || words.has("relaxed") || words.has("acquire") ||
                  words.has("release") || words.has("acq_rel");
    i.acquires = words.has("acquire") || words.has("acq_rel");
    i.releases = words.has("release") || words.has("acq_rel");
    i.is_read_only = words.has("nc");
  }

  void read_access(Instruction& i, const Words& words) {
    bool is_load = words.parts[0] == "ld";
    const std::string& address = words.operands[is_load ? 1 : 0];
    const std::string& value = words.operands[is_load ? 0 : 1];
    std::string base = without_brackets(address).substr(0, without_brackets(address).find('+'));
    if (Names::Symbol* symbol = names_.find(base);
        base[0] != '%' && symbol != nullptr && symbol->is_register) {
      // An argument or result of a call.
      std::string place = is_load ? value : base, from = is_load ? base : value;
      int width = symbol->width;
      choose(i, width == 8 ? "mov.b64" : "mov.b32");
      i.is_copy = true;
      i.out[0] = operand(place, width), i.in[0] = operand(from, width);
      return;
    }
    read_address(i, words, address);
    Strings values = value[0] == '{' ? split_operands(without_brackets(value)) : Strings{value};
    i.count = uint8_t(values.size());
    int width = bytes_of(words.type()) == 8 ? 8 : 4;
    for (size_t k = 0; k < values.size(); ++k) {
      width = std::max(width, names_.width_of_register(values[k]));
      (is_load ? i.out[k] : i.in[k + 1]) = operand(values[k], -1);
    }
    choose(i, words.parts[0] + "." + words.type() + "." + std::to_string(width));
  }

  void read_atomic(Instruction& i, const Words& words) {
    size_t first = words.parts[0] == "atom" ? 1 : 0; // red has no output
    read_address(i, words, words.operands[first]);
    i.is_strong = !words.has("weak"); // which no atomic operation is but in test_mutations.py
    int width = width_of(words.type());
    i.out[0] = first > 0 ? output(words.operands[0], width) : Operand{};
    i.in[1] = operand(words.operands[first + 1], width);
    for (const char* name : {"add", "min", "max", "and", "or", "exch"}) {
      if (words.has(name)) {
        choose(i, std::string("atom.") + name + "." + words.type());
        return;
      }
    }
    refuse("unknown atomic operation");
  }

  void read_packing(Instruction& i, const Words& words) {
    Strings parts = split_operands(without_brackets(words.operands[1]));
    size_t bytes = bytes_of(words.type()) / parts.size();
    i.count = uint8_t(parts.size());
    i.out[0] = operand(words.operands[0], width_of(words.type()));
    for (size_t k = 0; k < parts.size(); ++k) {
      i.in[k] = operand(parts[k], 4);
    }
    choose(i, "pack." + std::to_string(bytes) + "." + std::to_string(bytes_of(words.type())));
  }

  void read_unpacking(Instruction& i, const Words& words) {
    Strings parts = split_operands(without_brackets(words.operands[0]));
    size_t bytes = bytes_of(words.type()) / parts.size();
    i.count = uint8_t(parts.size());
    i.in[0] = operand(words.operands[1], width_of(words.type()));
    for (size_t k = 0; k < parts.size(); ++k) {
      i.out[k] = output(parts[k], 4);
    }
    choose(i, "unpack." + std::to_string(bytes) + "." + std::to_string(bytes_of(words.type())));
  }

  // "call (results), name, (arguments)": the function takes the place of the call.
  void read_call(Instruction& i, const Words& words) {
    Strings names;
    std::string callee;
    for (const std::string& part : words.operands) {
      if (part[0] == '(') {
        Strings more = split_operands(without_brackets(part));
        names.insert(names.end(), more.begin(), more.end());
      } else {
        callee = part;
      }
    }
    if (find_operation("call." + callee) != nullptr) {
      choose(i, "call." + callee);
      i.in[0] = operand(names[0], 8);
      return append(i);
    }
    auto found = text_.functions.find(callee);
    if (found == text_.functions.end() || i.guard) {
      refuse("unknown function " + callee);
    }
    Strings parameters = text_.parameters_of(found->second);
    names_.open();
    for (size_t k = 0; k < parameters.size(); ++k) {
      names_.declare_same(Declaration(parameters[k]).name, *names_.find(names[k]));
    }
    auto place = std::make_tuple(line_, location_, statement_);
    statement_.clear();
    read_body(found->second);
    std::tie(line_, location_, statement_) = place;
    names_.close();
  }

  const Text& text_;
  Kernel& kernel_;
  Names names_;
  std::vector<Function> functions_; // that are being read
  int line_ = 0;
  std::string location_, statement_;
};

} // namespace

Program::Program(const std::string& path) : text_(std::make_unique<Text>(path)) {}
Program::~Program() = default;

bool Program::has(const std::string& kernel) const { return text_->functions.count(kernel) > 0; }

Kernel& Program::find(const std::string& name) {
  std::unique_ptr<Kernel>& kernel = kernels_[name];
  if (kernel == nullptr) {
    auto decoded = std::make_unique<Kernel>();
    decoded->name = name, decoded->file = text_->name;
    Decoder(*text_, *decoded).decode(text_->functions.at(name));
    kernel = std::move(decoded);
  }
  return *kernel;
}

} // namespace ptx
