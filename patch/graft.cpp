#include <torchgraft/patch/graft.h>

#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/module/draft.h>

namespace torchgraft {

using torch::jit::Module;

Module graft(const Module& module, const std::vector<AdapterSpec>& specs, const GraftOptions& options) {
  TORCH_CHECK(!specs.empty(), "graft: no adapter was given");
  Draft draft = open_draft(module, options);
  for (const AdapterSpec& spec : specs) {
    check_name(spec.name, draft.adapters);
    draft.adapters.push_back(make_adapter(spec, draft.sites.structure, draft.weights));
  }
  return build(std::move(draft), options.active.empty() ? specs.back().name : options.active);
}

}  // namespace torchgraft
