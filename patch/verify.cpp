#include <torchgraft/patch/verify.h>

#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/verify_change.h>
#include <torchgraft/patch/module/verify_results.h>

#include <algorithm>

namespace torchgraft {

std::vector<std::string> verify(const torch::jit::Module& module,
                                const std::optional<std::vector<c10::IValue>>& example) {
  check_grafted(module, "verify");
  std::vector<SameResult> pairs;
  const torch::jit::Module lowered = lower(module, {/*verify=*/false});
  for (const AdapterInfo& info : list_adapters(module)) {
    const std::string name = "'" + info.name + "'";
    pairs.push_back({{module, "forward", info.name}, {lowered, "forward", info.name}, name + " by ATen calls"});
    if (info.merged) {
      const torch::jit::Module unmerged = unmerge_adapter(module, info.name, {/*verify=*/false});
      pairs.push_back({{module, "base_forward"}, {unmerged, "forward", info.name}, name + ", unmerged,"});
      pairs.push_back({{module, "base_forward"}, {module, "forward", info.name}, name + ", which is merged,"});
    }
  }
  std::vector<std::string> reasons = {
      verify_results(base_copy(module), module, example, open_grafted(module, "verify").weights),
      verify_change(module, pairs, example, "verify")};
  std::erase(reasons, "");
  reasons.erase(std::unique(reasons.begin(), reasons.end()), reasons.end());
  return reasons;
}

}  // namespace torchgraft
