#include "model.h"

#include <torchgraft/registration/error_text.h>
#include <torchgraft/registration/tensor_records.h>

#include <torch/script.h>

#include <chrono>
#include <filesystem>
#include <numeric>
#include <stdexcept>

namespace {

// The first tensor in a result, which may be a tuple, a list or a dictionary of tensors.
std::optional<at::Tensor> first_tensor(const c10::IValue& value) {
  if (value.isTensor()) {
    return value.toTensor();
  }
  std::vector<c10::IValue> elements;
  if (value.isTuple()) {
    elements = value.toTupleRef().elements().vec();
  } else if (value.isList()) {
    elements = value.toListRef().vec();
  } else if (value.isGenericDict()) {
    for (const auto& entry : value.toGenericDict()) {
      elements.push_back(entry.value());
    }
  }
  for (const c10::IValue& element : elements) {
    if (auto tensor = first_tensor(element)) {
      return tensor;
    }
  }
  return std::nullopt;
}

at::Tensor output_of(const c10::IValue& result) {
  auto tensor = first_tensor(result);
  if (!tensor) {
    throw std::runtime_error("forward returned no tensor but a " + result.tagKind());
  }
  return tensor->detach();
}

LayerGates read_layers(const c10::IValue& dictionary) {
  LayerGates layers;
  for (const auto& layer : dictionary.toGenericDict()) {
    for (const auto& location : layer.value().toGenericDict()) {
      layers[layer.key().toInt()][location.key().toStringRef()] = location.value().toTensor().detach();
    }
  }
  return layers;
}

// The rows of the batch that `gates` belong to: those with the adapter's id, or all, without ids.
std::vector<int64_t> rows_of(const AdapterGates& gates, const std::vector<int64_t>& ids,
                             const std::vector<std::string>& names) {
  std::vector<int64_t> rows;
  for (size_t row = 0; row < ids.size(); ++row) {
    if (ids[row] >= 0 && names.at(ids[row]) == gates.adapter) {
      rows.push_back(static_cast<int64_t>(row));
    }
  }
  if (ids.empty() && !gates.layers.empty()) {
    rows.resize(gates.layers.begin()->second.begin()->second.size(0));
    std::iota(rows.begin(), rows.end(), 0);
  }
  return rows;
}

}  // namespace

Model::Model(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) {
    throw std::runtime_error(path + ": no such file");
  }
  try {
    torchgraft::check_tensor_records(path);
    module_ = torch::jit::load(path, torch::kCPU);
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": not a TorchScript file that can be loaded: " + torchgraft::one_line(error));
  }
  module_.eval();
}

bool Model::is_grafted() const { return module_.find_method("forward_with_gates").has_value(); }

std::vector<std::string> Model::adapter_names() {
  std::vector<std::string> names;
  if (is_grafted()) {
    const c10::IValue list = module_.run_method("adapter_names");
    for (const c10::IValue& name : list.toListRef()) {
      names.push_back(name.toStringRef());
    }
  }
  return names;
}

std::string Model::active_adapter() {
  const c10::IValue name = is_grafted() ? module_.run_method("active_adapter") : c10::IValue();
  return name.isString() ? name.toStringRef() : "";
}

void Model::activate(const std::string& name) {
  if (!is_grafted()) {
    throw std::runtime_error("the model has no adapters; graft some onto it with torchgraft add");
  }
  module_.run_method("activate", name);
}

c10::IValue Model::call(const char* method, std::vector<c10::IValue> inputs, const std::vector<int64_t>& ids) {
  torch::jit::Kwargs named;
  if (!ids.empty()) {
    if (!is_grafted()) {
      throw std::runtime_error("the model has no adapters, so rows cannot choose among them");
    }
    named["adapter_ids"] = torch::tensor(ids, torch::kInt64);
  }
  return module_.get_method(method)(std::move(inputs), named);
}

Response Model::run(const std::vector<c10::IValue>& inputs, const std::vector<int64_t>& ids) {
  const c10::InferenceMode no_gradients;
  if (!is_grafted()) {
    return {output_of(call("forward", inputs, ids)), {}};
  }
  const c10::IValue result = call("forward_with_gates", inputs, ids);
  const auto& parts = result.toTupleRef().elements();
  Response response{output_of(parts.at(0)), {}};
  const std::vector<std::string> names = adapter_names();
  for (const auto& entry : parts.at(1).toGenericDict()) {
    AdapterGates gates{entry.key().toStringRef(), {}, read_layers(entry.value())};
    gates.rows = rows_of(gates, ids, names);
    response.gates.push_back(std::move(gates));
  }
  return response;
}

std::vector<double> Model::time(const std::vector<c10::IValue>& inputs, const std::vector<int64_t>& ids, int repeat) {
  const c10::InferenceMode no_gradients;
  constexpr int kWarmUp = 2;
  std::vector<double> milliseconds;
  for (int run = 0; run < kWarmUp + repeat; ++run) {
    const auto started = std::chrono::steady_clock::now();
    call("forward", inputs, ids);
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - started;
    if (run >= kWarmUp) {
      milliseconds.push_back(taken.count());
    }
  }
  return milliseconds;
}
