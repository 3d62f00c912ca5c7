#include <torchgraft/plan/prefix_mlp.h>

#include <torchgraft/activations/activation.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace torchgraft {

at::Tensor eject(const ModuleWeights& mlp, const std::string& non_linearity) {
  at::NoGradGuard no_grad;
  const at::Tensor hidden = at::linear(mlp.at("embeddings"), mlp.at("down_weight"), mlp.at("down_bias"));
  return at::linear(find_activation(non_linearity).forward(hidden), mlp.at("up_weight"), mlp.at("up_bias"));
}

std::pair<at::Tensor, at::Tensor> prefix_of_layer(const at::Tensor& ejected, const PlannedPrefix& prefix) {
  // [P, L * 2, h, d]: keys of layer i at 2 i, values at 2 i + 1
  const at::Tensor all =
      ejected.view({prefix.config.prefix_length, prefix.group_size * 2, prefix.num_kv_heads, prefix.head_dim});
  const auto part = [&](int64_t index) { return all.select(1, index).transpose(0, 1).contiguous(); };
  return {part(2 * prefix.group_index), part(2 * prefix.group_index + 1)};
}

}  // namespace torchgraft
