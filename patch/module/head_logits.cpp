#include <torchgraft/patch/module/head_logits.h>

#include <torchgraft/patch/graph/activation_source.h>

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <map>
#include <mutex>

namespace torchgraft {
namespace {

constexpr const char* kHeadLogitsMethods = R"python(
def pooled(self, hidden: Tensor, token_mask: Optional[Tensor], pooling: str) -> Tensor:
    if pooling == "none":
        return hidden
    if pooling == "first":
        return hidden.select(1, 0)
    if token_mask is None:
        if pooling == "mean":
            return hidden.mean(1)
        return hidden.select(1, -1)
    keep = token_mask.ne(0)
    if pooling == "mean":
        total = hidden.masked_fill(torch.logical_not(keep).unsqueeze(-1), 0.0).sum(1)
        return total / keep.sum(1).clamp(min=1).unsqueeze(-1).to(hidden.dtype)
    positions = torch.arange(hidden.size(1), device=hidden.device)
    last = torch.where(keep, positions, torch.zeros_like(positions)).amax([1])
    return hidden.gather(1, last.view(-1, 1, 1).expand(-1, 1, hidden.size(2))).squeeze(1)

def head_logits(self, hidden: Tensor, token_mask: Optional[Tensor], pooling: str, layers: int, activation: str,
                dropout: float, dense_weight: Tensor, dense_bias: Tensor, out_weight: Tensor,
                out_bias: Tensor) -> Tensor:
    x = self.pooled(hidden, token_mask, pooling)
    for layer in range(layers - 1):
        x = torch.dropout(x, dropout, self.training)
        x = self.activated(torch.linear(x, dense_weight[layer], dense_bias[layer]), activation)
    x = torch.dropout(x, dropout, self.training)
    return torch.linear(x, out_weight, out_bias)
)python";

// head_logits of a module without weights, compiled once for each non-linearity. Methods live as long as the process.
const torch::jit::Method& compiled_for(const std::string& activation) {
  static auto& mutex = *new std::mutex;
  static auto& methods = *new std::map<std::string, torch::jit::Method>;
  const std::lock_guard lock(mutex);
  const auto found = methods.find(activation);
  if (found != methods.end()) {
    return found->second;
  }
  torch::jit::Module module("__torch__.torchgraft.HeadLogits");
  module.register_attribute("training", c10::BoolType::get(), false);
  module.define(head_methods({activation}));
  return methods.emplace(activation, module.get_method("head_logits")).first->second;
}

}  // namespace

std::string head_methods(const std::set<std::string>& activations) {
  std::string source = "\ndef activated(self, inner: Tensor, name: str) -> Tensor:\n";
  for (const std::string& name : activations) {
    source += "    if name == \"" + name + "\":\n        return " + activation_source(name) + "\n";
  }
  return source + "    return inner\n" + kHeadLogitsMethods;
}

std::string head_pooling(const HeadConfig& config) { return config.head_type == "tagging" ? "none" : config.pooling; }

std::string head_activation(const HeadConfig& config) { return config.activation_function.value_or("linear"); }

at::Tensor head_logits(const Head& head, const at::Tensor& hidden, const at::Tensor& token_mask) {
  TORCH_CHECK(hidden.dim() == 3, "head_logits: expected hidden states [B, S, H], got ", hidden.sizes());
  // The optimising executor would take a fifth of a second for its first calls, and save nothing later.
  const torch::jit::GraphOptimizerEnabledGuard plain_interpreter(false);
  const c10::IValue mask = token_mask.defined() ? c10::IValue(token_mask) : c10::IValue();
  const std::string activation = head_activation(head.config);
  const auto weight = [&](const char* name) { return head.weights.at(name); };
  return compiled_for(activation)({hidden, mask, head_pooling(head.config), head.config.layers, activation,
                                   /*dropout=*/0.0, weight("dense_weight"), weight("dense_bias"), weight("out_weight"),
                                   weight("out_bias")})
      .toTensor();
}

}  // namespace torchgraft
