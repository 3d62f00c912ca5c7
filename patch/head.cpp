#include <torchgraft/patch/head.h>

#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/plan/head_weights.h>

namespace torchgraft {

using torch::jit::Module;

Module add_head(const Module& module, const std::string& name, const HeadConfig& config,
                const std::string& token_mask_input) {
  check_supported(config);
  Draft draft = open_grafted(module, "add_head");
  Adapter& adapter = draft.adapters[find_plain(draft, name, "add_head")];
  const int64_t hidden_size = draft.sites.structure.layers.back().hidden_size;
  adapter.head = Head{config, init_head(config, hidden_size, draft.weights)};
  draft.head_mask = head_mask(draft, token_mask_input);
  return build(std::move(draft), active_name(module));
}

Module remove_head(const Module& module, const std::string& name) {
  Draft draft = open_grafted(module, "remove_head");
  Adapter& adapter = draft.adapters[find_plain(draft, name, "remove_head")];
  TORCH_CHECK(adapter.head, "remove_head: '", name, "' has no head");
  adapter.head.reset();
  return build(std::move(draft), active_name(module));
}

std::string head_config(const Module& module, const std::string& name) {
  check_grafted(module, "head_config");
  const Module adapters = module.attr("adapters").toModule();
  const size_t index = find_adapter(adapters, name, "head_config");
  return adapters.hasattr("heads") ? adapters.attr("heads").toModule().attr("configs").toListRef()[index].toStringRef()
                                   : "";
}

}  // namespace torchgraft
