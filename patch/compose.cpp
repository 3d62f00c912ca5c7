#include <torchgraft/patch/compose.h>

#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/verify_results.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace torchgraft {

using torch::jit::Module;

Module compose(const Module& module, const std::string& name, const Composition& tree, const VerifyOptions& verifying) {
  check_composition(tree, "compose");
  check_supported(tree, "compose");
  Draft draft = open_grafted(module, "compose");
  check_free_name(draft, name);
  for (const NamedComposition& other : draft.compositions) {
    const std::vector<std::string> parts = adapters_in(tree);
    TORCH_CHECK(std::find(parts.begin(), parts.end(), other.name) == parts.end(), "compose: '", name, "', ",
                composition_to_string(tree), ", uses '", other.name, "', which is a composition, ",
                composition_to_string(other.tree), "; name its adapters");
  }
  draft.compositions.push_back({name, tree, std::nullopt});
  check_parts(draft.compositions.back(), draft.adapters, "compose");
  draft.example = verifying.example;
  const at::TensorOptions weights = draft.weights;
  const std::vector<Adapter> adapters = draft.adapters;
  Module result = build(std::move(draft), active_name(module));
  if (verifying.verify) {
    const Verifier verifier{"compose",
                            "; verify=False (C++: VerifyOptions::verify = false) composes without comparing"};
    const BaseAndGrafted both{module, result};
    const std::string reason = verify_results(both, with_drawn_weights(both, adapters, adapters), verifying.example,
                                              weights, {name}, verifier);
    if (!reason.empty()) {
      TORCH_WARN("compose: ", reason, ". verify=False does without");
    }
  }
  return result;
}

}  // namespace torchgraft
