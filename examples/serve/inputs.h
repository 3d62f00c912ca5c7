#pragma once

#include <ATen/core/ivalue.h>

#include <string>
#include <vector>

// The positional arguments of forward from a JSON file
//   {"inputs": [[[101, 2023, 102], [101, 102, 0]], [[1, 1, 1], [1, 1, 0]]], "dtypes": ["int64", "int64"]}
// one nested list of numbers per argument (null for an Optional one that is left out). "dtypes" may be absent: int64.
// Throws std::runtime_error that says where the file is wrong.
std::vector<c10::IValue> read_inputs(const std::string& path);
