#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

// What a request wants of the adapters: nothing (the file's active one), one name, or one id per row (-1: the base).
struct Choice {
  std::string adapter;
  std::vector<int64_t> ids;
};

// gates[layer][location]: [rows that used the adapter, gates of the location]
using LayerGates = std::map<int64_t, std::map<std::string, at::Tensor>>;

struct AdapterGates {
  std::string adapter;
  // Of the batch, in the order of the gates' rows. Empty for an adapter without gates that no ids asked for: all rows.
  std::vector<int64_t> rows;
  LayerGates layers;
};

struct Response {
  at::Tensor output;                // the first tensor of what forward returned
  std::vector<AdapterGates> gates;  // empty for a base model
};

// A TorchScript file, usually a grafted one. Requests share it and keep no state in it, so threads may, too.
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

  // Milliseconds of `repeat` plain forward passes, after two that are not counted (the JIT compiles during those).
  std::vector<double> time(const std::vector<c10::IValue>& inputs, const std::vector<int64_t>& ids, int repeat);

 private:
  c10::IValue call(const char* method, std::vector<c10::IValue> inputs, const std::vector<int64_t>& ids);

  torch::jit::Module module_;
};
