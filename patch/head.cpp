#include <torchgraft/patch/head.h>

#include <torchgraft/patch/module/draft.h>
#include <torchgraft/plan/head_weights.h>

namespace torchgraft {

using torch::jit::Module;

Module add_head(const Module& module, const std::string& name, const HeadConfig& config,
                const std::string& token_mask_input) {
  check_supported(config);
  Foundation foundation = open_grafted(module, "add_head");
  Adapter& adapter = foundation.adapters[find_adapter(foundation.adapters, name, "add_head")];
  const int64_t hidden_size = foundation.sites.structure.layers.back().hidden_size;
  adapter.head = Head{config, init_head(config, hidden_size, foundation.weights)};
  foundation.head_mask = head_mask(foundation, token_mask_input);
  return build(std::move(foundation), active_name(module));
}

Module remove_head(const Module& module, const std::string& name) {
  Foundation foundation = open_grafted(module, "remove_head");
  Adapter& adapter = foundation.adapters[find_adapter(foundation.adapters, name, "remove_head")];
  TORCH_CHECK(adapter.head, "remove_head: '", name, "' has no head");
  adapter.head.reset();
  return build(std::move(foundation), active_name(module));
}

std::string head_config(const Module& module, const std::string& name) {
  check_grafted(module, "head_config");
  const Module adapters = module.attr("adapters").toModule();
  const size_t index = check_known(adapters, name, "head_config");
  return adapters.hasattr("heads") ? adapters.attr("heads").toModule().attr("configs").toListRef()[index].toStringRef()
                                   : "";
}

}  // namespace torchgraft
