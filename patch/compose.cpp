#include <torchgraft/patch/compose.h>

#include <torchgraft/patch/module/draft.h>
#include <torchgraft/patch/module/methods.h>
#include <torchgraft/patch/module/verify_results.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace torchgraft {

using torch::jit::Module;

namespace {

// A bank of `module` that its adapters, read back and stacked again, do not give: rows of smaller adapters are filled
// up with zeros, and somebody wrote over them. Empty: there is none.
std::string written_bank(const Module& module, const Module& result) {
  std::map<std::string, at::Tensor> banks;
  for (const auto& bank : result.attr("adapters").toModule().named_parameters()) {
    banks.emplace(bank.name, bank.value);
  }
  for (const auto& bank : module.attr("adapters").toModule().named_parameters()) {
    const auto found = banks.find(bank.name);
    if (found != banks.end() && found->second.sizes() == bank.value.sizes() && !found->second.equal(bank.value)) {
      return bank.name;
    }
  }
  return "";
}

}  // namespace

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
    std::string reason;
    try {
      reason = verify_results(both, with_drawn_weights(both, adapters, adapters), verifying.example, weights, {name},
                              verifier);
    } catch (const c10::Error&) {
      const std::string bank = written_bank(module, result);
      TORCH_CHECK(bank.empty(), "compose: the bank adapters.", bank, " of the module has numbers where none of its ",
                  "adapters has a weight: smaller adapters fill up their rows with zeros, and somebody wrote over ",
                  "them; write only the part of a row that its adapter has, or replace the adapter (replace_adapter)");
      throw;
    }
    if (!reason.empty()) {
      TORCH_WARN("compose: ", reason, ". verify=False does without");
    }
  }
  return result;
}

}  // namespace torchgraft
