#pragma once

#include <ATen/core/ivalue.h>

#include <string>
#include <vector>

// The positional arguments of forward from a JSON file
//   {"inputs": [[[101, 2023, 102], [101, 102, 0]], [[1, 1, 1], [1, 1, 0]]], "dtypes": ["int64", "int64"]}
// one nested list of numbers per argument; null leaves an Optional one out. Without "dtypes" all are int64.
// Throws std::runtime_error with the place of the error in the file.
std::vector<c10::IValue> read_inputs(const std::string& path);
