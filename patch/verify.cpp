#include <torchgraft/patch/verify.h>

#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/drawn_weights.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/verify_change.h>
#include <torchgraft/patch/module/verify_results.h>

#include <algorithm>

namespace torchgraft {

std::vector<std::string> verify(const torch::jit::Module& module,
                                const std::optional<std::vector<c10::IValue>>& example) {
  const Draft draft = open_grafted(module, "verify");
  const DrawnCopy drawn = with_drawn_weights(module, draft.adapters);
  const torch::jit::Module& tried = drawn.module;
  const Verifier verifier{"verify"};
  std::vector<SameResult> pairs;
  std::vector<std::string> names;
  for (const AdapterInfo& info : list_adapters(module)) {
    const std::string name = "'" + info.name + "'";
    names.push_back(info.name);
    if (info.merged) {
      const torch::jit::Module unmerged = unmerge_adapter(tried, info.name, {/*verify=*/false});
      pairs.push_back({{tried, "base_forward"}, {unmerged, "forward", info.name}, name + ", unmerged,"});
      pairs.push_back({{tried, "base_forward"}, {tried, "forward", info.name}, name + ", which is merged,"});
    }
  }
  const BaseAndGrafted modules{base_copy(module), module};
  std::optional<BaseAndGrafted> with_drawn;
  if (drawn.has_drawn) {
    with_drawn = {modules.base, tried};
  }
  std::vector<std::string> reasons = {verify_results(modules, with_drawn, example, draft.weights, names, verifier),
                                      pairs.empty() ? "" : verify_change(module, pairs, example, verifier)};
  std::erase(reasons, "");
  reasons.erase(std::unique(reasons.begin(), reasons.end()), reasons.end());
  return reasons;
}

}  // namespace torchgraft
