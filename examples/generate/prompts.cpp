#include "prompts.h"

#include <torchgraft/registration/parse_json.h>

#include <fcntl.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace {

Tokens read_prompt(const nlohmann::json& prompt, const std::string& place) {
  if (!prompt.is_array() || prompt.empty()) {
    throw std::runtime_error(place + ": expected a list of at least one token id");
  }
  Tokens tokens;
  for (const nlohmann::json& token : prompt) {
    if (!token.is_number_integer() || token.get<int64_t>() < 0) {
      throw std::runtime_error(place + ": expected token ids of at least 0, got " + token.dump());
    }
    tokens.push_back(token.get<int64_t>());
  }
  return tokens;
}

}  // namespace

std::vector<Tokens> read_prompts(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file || !std::filesystem::is_regular_file(path)) {
    throw std::runtime_error(path + ": no such file, or it cannot be read");
  }
  const auto json = torchgraft::parse_json(text.str(), path);
  if (!json.is_object() || !json.contains("prompts") || !json.at("prompts").is_array() || json.at("prompts").empty()) {
    throw std::runtime_error(path + R"(: expected {"prompts": [[5, 6, 7], ...]} with at least one prompt)");
  }
  std::vector<Tokens> prompts;
  for (const auto& prompt : json.at("prompts")) {
    prompts.push_back(read_prompt(prompt, path + ": prompts[" + std::to_string(prompts.size()) + "]"));
  }
  return prompts;
}

void write_tokens(const std::string& path, const std::vector<Tokens>& tokens) {
  const std::string temporary = path + ".new";
  const std::string text = nlohmann::json{{"tokens", tokens}}.dump() + "\n";
  const int file = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  const bool is_written =
      file >= 0 && write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size()) && fsync(file) == 0;
  const bool is_closed = file >= 0 && close(file) == 0;
  if (!is_written || !is_closed || std::rename(temporary.c_str(), path.c_str()) != 0) {
    const std::string reason = std::strerror(errno);
    unlink(temporary.c_str());
    throw std::runtime_error(path + ": cannot be written: " + reason);
  }
}
