#include <torchgraft/patch/graft.h>

#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/verify_results.h>

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

}  // namespace torchgraft
