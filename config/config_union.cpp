#include <torchgraft/config/config_union.h>

#include <c10/util/Exception.h>

namespace torchgraft {
namespace {

const char* method_name(const MethodConfig& method) {
  return std::holds_alternative<BnConfig>(method)             ? "bottleneck"
         : std::holds_alternative<PrefixTuningConfig>(method) ? "prefix tuning"
         : std::holds_alternative<ReftConfig>(method)         ? "ReFT"
         : std::holds_alternative<PromptTuningConfig>(method) ? "prompt tuning"
                                                              : "LoRA";
}

bool is_vera_or_mtl_lora(const MethodConfig& method) {
  const auto* lora = std::get_if<LoRAConfig>(&method);
  return lora && (lora->vera_d || lora->vera_b || lora->mtl_lora);
}

bool leaves_layers_out(const MethodConfig& method) {
  return std::visit(
      [](const auto& config) {
        if constexpr (requires { config.leave_out; }) {
          return !config.leave_out.empty();
        }
        return false;
      },
      method);
}

}  // namespace

AdapterConfig config_union(std::vector<MethodConfig> methods) {
  for (size_t i = 0; i < methods.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const MethodConfig& a = methods[j];
      const MethodConfig& b = methods[i];
      TORCH_CHECK(a.index() != b.index() || !(is_vera_or_mtl_lora(a) || is_vera_or_mtl_lora(b)),
                  "config: a union has two LoRA configs (", j, " and ", i,
                  "), one of them VeRA or MTL-LoRA; the library takes at most one LoRA config in such a union");
      if (a.index() != b.index() || leaves_layers_out(a) || leaves_layers_out(b)) {
        continue;
      }
      const auto* left = std::get_if<BnConfig>(&a);
      const auto* right = std::get_if<BnConfig>(&b);
      const bool apart = left && left->mh_adapter != right->mh_adapter && left->output_adapter != right->output_adapter;
      TORCH_CHECK(apart, "config: a union has two ", method_name(a), " configs (", j, " and ", i,
                  ") for the same locations; ",
                  left ? "give each its own of mh_adapter and output_adapter, or use leave_out"
                  : std::holds_alternative<ReftConfig>(a)         ? "give one config all their layers"
                  : std::holds_alternative<PromptTuningConfig>(a) ? "give one config all tokens"
                                                                  : "use leave_out to give each its own layers");
    }
  }
  return AdapterConfig{std::move(methods)};
}

}  // namespace torchgraft
