#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

// How a request chooses adapters: not at all (the file's active one), by a name for every row, or by an id for each row
// (-1: the base model).
struct Choice {
  std::string adapter;
  std::vector<int64_t> ids;
};

// gates[layer][location]: [rows that used the adapter, gates of the location]
using LayerGates = std::map<int64_t, std::map<std::string, at::Tensor>>;

struct AdapterGates {
  std::string adapter;
  // The rows of the batch that the rows of `layers` belong to, in their order. Without ids they are all rows, but none
  // for an adapter without gates.
  std::vector<int64_t> rows;
  LayerGates layers;
};

struct Response {
  at::Tensor output;                // the first tensor of what forward returned
  std::vector<AdapterGates> gates;  // empty for a base model
};

// A TorchScript file, usually a grafted one. run() and time() leave no state in it, so threads can share it.
class Model {
 public:
  // Throws std::runtime_error or c10::Error.
  explicit Model(const std::string& path);

  bool is_grafted() const;
  std::vector<std::string> adapter_names();  // adapter_ids index this list
  std::string active_adapter();              // "" when none is

  // Makes `name` the adapter of the calls that give no ids.
  void activate(const std::string& name);

  // One forward pass with gates.
  Response run(const std::vector<c10::IValue>& inputs, const std::vector<int64_t>& ids);

  // Milliseconds of each of `repeat` plain forward passes, after two in which the JIT compiles.
  std::vector<double> time(const std::vector<c10::IValue>& inputs, const std::vector<int64_t>& ids, int repeat);

 private:
  c10::IValue call(const char* method, std::vector<c10::IValue> inputs, const std::vector<int64_t>& ids);

  torch::jit::Module module_;
};
