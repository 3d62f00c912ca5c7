#pragma once

#include <cstdint>
#include <string>
#include <vector>

using Tokens = std::vector<int64_t>;

// The token ids of {"prompts": [[5, 6, 7], [8]]}. Throws std::runtime_error with the place of the error.
std::vector<Tokens> read_prompts(const std::string& path);

// {"tokens": [[9, 10], [11]]}, in a file that appears whole or not at all.
void write_tokens(const std::string& path, const std::vector<Tokens>& tokens);
