// A parsed PTX module: its functions, variables and source files.
#pragma once

#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

using Strings = std::vector<std::string>;

std::string strip(std::string_view text); // whitespace and comments
Strings split(const std::string& text, char separator);
Strings split_operands(const std::string& text); // "%r1, {%r2, %r3}, [%rd4+8]" -> 3 strings
std::string strip_brackets(const std::string& text);
size_t bytes_of(const std::string& type); // "b8", "f64"
// Bytes per lane of a register of this type; 0 for a predicate.
int register_width(const std::string& type);
size_t round_up(size_t value, size_t multiple);

// For example ".shared .align 16 .b8 name[8192]".
struct Declaration {
  std::string name, type;
  size_t align = 1, bytes = 0;

  explicit Declaration(const std::string& text);
};

struct Module {
  std::string name; // of the file
  Strings lines;
  std::map<std::string, size_t> functions; // first line of each kernel and device function
  std::map<std::string, std::vector<char>> variables; // .global
  std::map<std::string, Declaration> shared;          // .shared, at module scope
  std::set<std::string> dynamic_shared;               // .extern .shared
  std::map<std::string, std::string> files;           // source file names, by .file index

  explicit Module(const std::string& path);
  // Parameters of the function declared at `line`. The return value, if any, comes first.
  Strings parameters_of(size_t line) const;

 private:
  void parse_file(const std::string& line);
  void parse_variable(const std::string& line);
  void parse_function(const std::string& line);
};

} // namespace ptx
