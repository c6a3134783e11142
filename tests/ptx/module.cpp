#include "module.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace ptx {

std::string strip(std::string_view text) {
  text = text.substr(0, text.find("//"));
  size_t first = text.find_first_not_of(" \t\r"), last = text.find_last_not_of(" \t\r");
  return first == std::string_view::npos ? "" : std::string(text.substr(first, last - first + 1));
}

Strings split(const std::string& text, char separator) {
  Strings out;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    out.push_back(part);
  }
  return out;
}

Strings split_operands(const std::string& text) {
  Strings out(1);
  int depth = 0;
  for (char c : text) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == ',' && depth == 0) {
      out.emplace_back();
    } else if (!std::isspace(static_cast<unsigned char>(c))) {
      out.back() += c;
    }
  }
  return out.back().empty() ? Strings(out.begin(), out.end() - 1) : out;
}

std::string strip_brackets(const std::string& text) { return text.substr(1, text.size() - 2); }

size_t bytes_of(const std::string& type) { return size_t(std::atoi(type.c_str() + 1)) / 8; }
int register_width(const std::string& type) {
  return type == "pred" ? 0 : bytes_of(type) == 8 ? 8 : 4;
}
size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

Declaration::Declaration(const std::string& text) {
  std::istringstream stream(strip(text.substr(0, text.find('='))));
  Strings words;
  for (std::string word; stream >> word;) {
    words.push_back(word);
  }
  name = words.back();
  type = words[words.size() - 2].substr(1);
  align = bytes = bytes_of(type);
  if (auto found = std::ranges::find(words, ".align"); found != words.end()) {
    align = size_t(std::atoi((found + 1)->c_str()));
  }
  if (size_t bracket = name.find('['); bracket != std::string::npos) {
    bytes *= size_t(std::atoi(name.c_str() + bracket + 1));
    name = name.substr(0, bracket);
  }
}

Module::Module(const std::string& path) : name(path.substr(path.rfind('/') + 1)) {
  std::ifstream stream(path);
  for (std::string line; std::getline(stream, line); lines.push_back(std::move(line))) {
    std::string stripped = strip(line);
    if (stripped.starts_with(".file")) {
      parse_file(stripped);
    } else if (line.starts_with(".global")) {
      parse_variable(stripped);
    } else if (line.starts_with(".shared")) {
      Declaration variable(stripped.substr(0, stripped.size() - 1));
      shared.emplace(variable.name, variable);
    } else if (line.starts_with(".extern .shared")) {
      dynamic_shared.insert(Declaration(stripped.substr(0, stripped.size() - 1)).name);
    } else if (line.starts_with(".") && !line.starts_with(".extern")) {
      parse_function(stripped);
    }
  }
  if (lines.empty()) {
    throw std::runtime_error("tests/ptx: cannot read " + path);
  }
}

void Module::parse_file(const std::string& line) { // .file 1 "/folder/name.cu"
  std::istringstream words(line);
  std::string file, number;
  words >> file >> number;
  std::string path = line.substr(0, line.rfind('"'));
  files[number] = path.substr(path.rfind('/') + 1);
}

void Module::parse_variable(const std::string& line) { // .global .align 1 .b8 name[3] = {97, 98};
  Declaration declaration(line);
  std::vector<char>& data = variables[declaration.name];
  data.resize(declaration.bytes);
  if (size_t brace = line.find('{'); brace != std::string::npos) {
    size_t k = 0;
    for (const std::string& value : split(line.substr(brace + 1), ',')) {
      data.at(k++) = char(std::atoi(value.c_str()));
    }
  }
}

void Module::parse_function(const std::string& line) { // .entry name(
  if (line.find(".entry") != std::string::npos || line.find(".func") != std::string::npos) {
    std::string head = line.substr(0, line.find_last_not_of("( ") + 1);
    functions[head.substr(head.find_last_of(" \t") + 1)] = lines.size();
  }
}

Strings Module::parameters_of(size_t line) const {
  std::string head;
  while (strip(lines[line]) != "{") {
    head += lines[line++] + " ";
  }
  std::ranges::replace_if(head, [](char c) { return c == '(' || c == ')'; }, ',');
  Strings out;
  for (const std::string& part : split(head, ',')) {
    if (strip(part).starts_with(".param")) {
      out.push_back(strip(part));
    }
  }
  return out;
}

} // namespace ptx
