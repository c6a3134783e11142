// The text of a PTX file, cut into pieces.
#pragma once

#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

using Strings = std::vector<std::string>;

std::string strip(std::string_view text); // of white space and comments
bool starts_with(const std::string& text, const char* prefix);
Strings split(const std::string& text, char separator);
Strings split_operands(const std::string& text); // "%r1, {%r2, %r3}, [%rd4+8]" in three
std::string without_brackets(const std::string& text);
size_t bytes_of(const std::string& type); // "b8", "f64"
int width_of(const std::string& type);    // of a register, per lane; 0 for a predicate

// What a declaration says: ".shared .align 16 .b8 name[8192]".
struct Declaration {
  std::string name, type;
  size_t align = 1, bytes = 0;

  explicit Declaration(const std::string& text);
};

struct Text {
  std::string name; // of the file
  Strings lines;
  std::map<std::string, size_t> functions; // and kernels: the lines where they begin
  std::map<std::string, std::vector<char>> variables;
  std::map<std::string, Declaration> shared; // variables outside of functions
  std::set<std::string> dynamic_shared;      // those whose size the launch says
  std::map<std::string, std::string> files;  // of the source, by number

  explicit Text(const std::string& path);
  // What a kernel or a function takes; first comes what it returns.
  Strings parameters_of(size_t line) const;

 private:
  void note_file(const std::string& line);
  void note_variable(const std::string& line);
  void note_function(const std::string& line);
};

} // namespace ptx
