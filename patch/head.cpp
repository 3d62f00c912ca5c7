#include <torchgraft/patch/head.h>

#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/plan/head_weights.h>

namespace torchgraft {

using torch::jit::Module;

namespace {

// Where the head of an adapter stands, or of a composition with a Fuse.
std::optional<Head>& head_place(Draft& draft, const std::string& name, const char* what) {
  if (const NamedComposition* fused = find_fused(draft.compositions, name)) {
    return draft.compositions[fused - draft.compositions.data()].head;
  }
  return draft.adapters[find_plain(draft, name, what)].head;
}

}  // namespace

Module add_head(const Module& module, const std::string& name, const HeadConfig& config,
                const std::string& token_mask_input) {
  check_supported(config);
  Draft draft = open_grafted(module, "add_head");
  const int64_t hidden_size = draft.sites.structure.layers.back().hidden_size;
  head_place(draft, name, "add_head") = Head{config, init_head(config, hidden_size, draft.weights)};
  draft.head_mask = head_mask(draft, token_mask_input);
  return build(std::move(draft), active_name(module));
}

Module load_head(const Module& module, const std::string& name, const HeadSpec& head) {
  check_supported(head.config);
  Draft draft = open_grafted(module, "load_head");
  const int64_t hidden_size = draft.sites.structure.layers.back().hidden_size;
  head_place(draft, name, "load_head") =
      Head{head.config, head_weights(head.config, hidden_size, head.weights, head.saved_name, draft.weights)};
  return build(std::move(draft), active_name(module));
}

Module remove_head(const Module& module, const std::string& name) {
  Draft draft = open_grafted(module, "remove_head");
  std::optional<Head>& head = head_place(draft, name, "remove_head");
  TORCH_CHECK(head, "remove_head: '", name, "' has no head");
  head.reset();
  return build(std::move(draft), active_name(module));
}

std::string head_config(const Module& module, const std::string& name) {
  check_grafted(module, "head_config");
  const Module adapters = module.attr("adapters").toModule();
  const auto index = static_cast<size_t>(find_id(adapters, name, "head_config"));
  if (!adapters.hasattr("heads")) {
    return "";
  }
  const Module heads = adapters.attr("heads").toModule();
  const auto configs = heads.attr("configs").toListRef();
  return index < configs.size() ? configs[index].toStringRef() : "";
}

}  // namespace torchgraft
