#include <torchgraft/patch/compose.h>

#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/drawn_weights.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/verify_results.h>

#include <optional>
#include <utility>

namespace torchgraft {

using torch::jit::Module;

Module compose(const Module& module, const std::string& name, const Composition& tree, const VerifyOptions& verifying) {
  check_composition(tree, "compose");
  Draft draft = open_grafted(module, "compose");
  check_free_name(draft, name);
  draft.compositions.push_back({name, tree});
  check_parts(draft.compositions.back(), draft.adapters, "compose");
  const at::TensorOptions weights = draft.weights;
  const std::vector<Adapter> adapters = draft.adapters;
  Module result = build(std::move(draft), active_name(module));
  if (verifying.verify) {
    const Verifier verifier{"compose",
                            "; verify=False (C++: VerifyOptions::verify = false) composes without comparing"};
    std::optional<BaseAndGrafted> drawn;
    if (const DrawnCopy copy = with_drawn_weights(result, adapters); copy.has_drawn) {
      drawn = {with_drawn_weights(module, adapters).module, copy.module};
    }
    const std::string reason = verify_results({module, result}, drawn, verifying.example, weights, {name}, verifier);
    if (!reason.empty()) {
      TORCH_WARN("compose: ", reason, ". verify=False does without");
    }
  }
  return result;
}

}  // namespace torchgraft
