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
  check_grafted(module, "verify");
  const torch::jit::Module tried = with_drawn_weights(module).module;
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
  std::vector<std::string> reasons = {
      verify_results(base_copy(module), tried, example, open_grafted(module, "verify").weights, names),
      pairs.empty() ? "" : verify_change(module, pairs, example, "verify")};
  std::erase(reasons, "");
  reasons.erase(std::unique(reasons.begin(), reasons.end()), reasons.end());
  return reasons;
}

}  // namespace torchgraft
