#include "text.h"

#include <algorithm>
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

bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

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

std::string without_brackets(const std::string& text) { return text.substr(1, text.size() - 2); }

size_t bytes_of(const std::string& type) { return size_t(std::atoi(type.c_str() + 1)) / 8; }
int width_of(const std::string& type) { return type == "pred" ? 0 : bytes_of(type) == 8 ? 8 : 4; }

Declaration::Declaration(const std::string& text) {
  std::istringstream stream(strip(text.substr(0, text.find('='))));
  Strings words;
  for (std::string word; stream >> word;) {
    words.push_back(word);
  }
  name = words.back();
  type = words[words.size() - 2].substr(1);
  align = bytes = bytes_of(type);
  if (auto found = std::find(words.begin(), words.end(), ".align"); found != words.end()) {
    align = size_t(std::atoi((found + 1)->c_str()));
  }
  if (size_t bracket = name.find('['); bracket != std::string::npos) {
    bytes *= size_t(std::atoi(name.c_str() + bracket + 1));
    name = name.substr(0, bracket);
  }
}

Text::Text(const std::string& path) : name(path.substr(path.rfind('/') + 1)) {
  std::ifstream stream(path);
  for (std::string line; std::getline(stream, line); lines.push_back(std::move(line))) {
    std::string stripped = strip(line);
    if (starts_with(stripped, ".file")) {
      note_file(stripped);
    } else if (starts_with(line, ".global")) {
      note_variable(stripped);
    } else if (starts_with(line, ".shared")) {
      Declaration variable(stripped.substr(0, stripped.size() - 1));
      shared.emplace(variable.name, variable);
    } else if (starts_with(line, ".extern .shared")) {
      dynamic_shared.insert(Declaration(stripped.substr(0, stripped.size() - 1)).name);
    } else if (starts_with(line, ".") && !starts_with(line, ".extern")) {
      note_function(stripped);
    }
  }
  if (lines.empty()) {
    throw std::runtime_error("tests/ptx: cannot read " + path);
  }
}

void Text::note_file(const std::string& line) { // .file 1 "/folder/name.cu"
  std::istringstream words(line);
  std::string file, number;
  words >> file >> number;
  std::string path = line.substr(0, line.rfind('"'));
  files[number] = path.substr(path.rfind('/') + 1);
}

void Text::note_variable(const std::string& line) { // .global .align 1 .b8 name[3] = {97, 98};
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

void Text::note_function(const std::string& line) { // .entry name(
  if (line.find(".entry") != std::string::npos || line.find(".func") != std::string::npos) {
    std::string head = line.substr(0, line.find_last_not_of("( ") + 1);
    functions[head.substr(head.find_last_of(" \t") + 1)] = lines.size();
  }
}

Strings Text::parameters_of(size_t line) const {
  std::string head;
  while (strip(lines[line]) != "{") {
    head += lines[line++] + " ";
  }
  std::replace_if(head.begin(), head.end(), [](char c) { return c == '(' || c == ')'; }, ',');
  Strings out;
  for (const std::string& part : split(head, ',')) {
    if (starts_with(strip(part), ".param")) {
      out.push_back(strip(part));
    }
  }
  return out;
}

} // namespace ptx
