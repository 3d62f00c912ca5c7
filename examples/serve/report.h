#pragma once

#include "model.h"

#include <ostream>
#include <string>
#include <vector>

// The output's shape and first values, one table of gates per adapter, and the median of `milliseconds` if there are
// any.
void print_report(std::ostream& stream, const Response& response, const std::vector<double>& milliseconds);

// The same in full precision (a JSON null where a value is not finite):
//   {"output": {"shape": [...], "dtype": "float32", "values": [...]},
//    "gates": {adapter: {"rows": [...], "layers": {"0": {"selfattn_lora": [[...], ...], ...}, ...}}},
//    "milliseconds": [...]}
// Throws std::runtime_error when the file cannot be written.
void write_report(const std::string& path, const Response& response, const std::vector<double>& milliseconds);
