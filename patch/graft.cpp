#include <torchgraft/patch/graft.h>

#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/graft_options.h>
#include <torchgraft/patch/module/make_adapter.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/verify_results.h>
#include <torchgraft/patch/sites/apply_sites.h>

namespace torchgraft {

using torch::jit::Module;

Module graft(const Module& module, const std::vector<AdapterSpec>& specs, const GraftOptions& options) {
  TORCH_CHECK(!specs.empty(), "graft: no adapter was given");
  Draft draft = open_draft(module, options);
  for (const AdapterSpec& spec : specs) {
    check_name(spec.name, draft.adapters);
    draft.adapters.push_back(make_adapter(spec, draft.sites.structure, draft.weights));
  }
  const at::TensorOptions weights = draft.weights;
  const Module result = build(std::move(draft), options.active.empty() ? specs.back().name : options.active);
  if (options.verify) {
    const std::string reason = verify_results(module, result, options.example, weights);
    if (!reason.empty()) {
      TORCH_WARN("graft: the result was not compared with the base's: ", reason, ". verify=False does without");
    }
  }
  return result;
}

Structure inspect(const Module& module, const std::optional<Structure>& sites) {
  const bool grafted = is_grafted(module);
  const CanonicalGraph canonical = canonicalise(module, grafted ? "base_forward" : "forward");
  return choose_sites(canonical, module, grafted && !sites ? remembered_sites(module) : sites).structure;
}

}  // namespace torchgraft
