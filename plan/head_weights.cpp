#include <torchgraft/plan/head_weights.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <vector>

namespace torchgraft {
namespace {

constexpr double kStd = 0.02;

// Positions of the linear maps in the library's Sequential: each layer is a dropout and a linear map; an activation
// follows all but the last.
std::vector<int64_t> positions(const HeadConfig& config) {
  const int64_t step = config.activation_function ? 3 : 2;
  std::vector<int64_t> result;
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    result.push_back(1 + step * layer);
  }
  return result;
}

}  // namespace

ModuleWeights init_head(const HeadConfig& config, int64_t hidden_size, const at::TensorOptions& options) {
  at::NoGradGuard no_grad;
  const int64_t dense = config.layers - 1;
  return {{"dense_weight", at::empty({dense, hidden_size, hidden_size}).normal_(0.0, kStd).to(options)},
          {"dense_bias", at::zeros({dense, hidden_size}, options)},
          {"out_weight", at::empty({config.num_labels, hidden_size}).normal_(0.0, kStd).to(options)},
          {"out_bias", at::zeros({config.num_labels}, options)}};
}

ModuleWeights head_weights(const HeadConfig& config, int64_t hidden_size, const StateDict& state,
                           const std::string& name, const at::TensorOptions& options) {
  size_t used = 0;
  const auto take = [&](int64_t position, const char* which, at::IntArrayRef shape) {
    const std::string key = c10::str("heads.", name, ".", position, ".", which);
    const auto found = state.find(key);
    TORCH_CHECK(found != state.end(), "head weights: ", key, " is missing");
    TORCH_CHECK(found->second.sizes() == shape, "head weights: expected ", key, " of shape ", shape, ", got ",
                found->second.sizes());
    TORCH_CHECK(found->second.is_floating_point(), "head weights: expected ", key,
                " to be of a floating-point type, got ", found->second.scalar_type());
    ++used;
    return found->second.detach().to(options);
  };
  const int64_t dense = config.layers - 1;
  ModuleWeights weights = {{"dense_weight", at::empty({dense, hidden_size, hidden_size}, options)},
                           {"dense_bias", at::empty({dense, hidden_size}, options)},
                           {"out_bias", at::zeros({config.num_labels}, options)}};
  const std::vector<int64_t> at = positions(config);
  for (int64_t i = 0; i + 1 < config.layers; ++i) {
    weights["dense_weight"][i].copy_(take(at[i], "weight", {hidden_size, hidden_size}));
    weights["dense_bias"][i].copy_(take(at[i], "bias", {hidden_size}));
  }
  weights["out_weight"] = take(at.back(), "weight", {config.num_labels, hidden_size});
  if (config.bias) {
    weights["out_bias"] = take(at.back(), "bias", {config.num_labels});
  }
  TORCH_CHECK(used == state.size(), "head weights: expected ", used, " tensors of the head '", name, "', got ",
              state.size());
  return weights;
}

StateDict head_state(const HeadConfig& config, const ModuleWeights& weights, const std::string& name) {
  StateDict state;
  const auto put = [&](int64_t position, const char* which, const at::Tensor& tensor) {
    state[c10::str("heads.", name, ".", position, ".", which)] = tensor.detach().cpu().contiguous().clone();
  };
  const std::vector<int64_t> at = positions(config);
  for (int64_t i = 0; i + 1 < config.layers; ++i) {
    put(at[i], "weight", weights.at("dense_weight")[i]);
    put(at[i], "bias", weights.at("dense_bias")[i]);
  }
  put(at.back(), "weight", weights.at("out_weight"));
  if (config.bias) {
    put(at.back(), "bias", weights.at("out_bias"));
  }
  return state;
}

}  // namespace torchgraft
