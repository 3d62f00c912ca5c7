#include <torchgraft/patch/compose.h>

#include <torchgraft/config/composition_tasks.h>
#include <torchgraft/patch/adapters/adapters_module.h>
#include <torchgraft/patch/adapters/compositions.h>
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

// Adds the composition, and those of its tasks that the draft has not. Returns the names of what rows can run.
std::vector<std::string> add_composition(Draft& draft, const NamedComposition& composition) {
  check_parts(composition, draft.adapters, "compose");
  const std::vector<Composition> tasks = tasks_of(composition.tree);
  draft.compositions.push_back(composition);
  if (tasks.empty()) {
    return {composition.name};
  }
  std::vector<std::string> names;
  for (size_t task = 0; task < tasks.size(); ++task) {
    const Composition& tree = tasks[task];
    const bool is_there = std::any_of(
        draft.compositions.begin(), draft.compositions.end(),
        [&](const NamedComposition& held) { return composition_to_json(held.tree) == composition_to_json(tree); });
    if (tree.kind == BlockKind::kAdapter || is_there) {
      continue;
    }
    names.push_back(composition.name + "_" + std::to_string(task));
    check_free_name(draft, names.back());
    draft.compositions.push_back({names.back(), tree, std::nullopt});
  }
  return names;
}

}  // namespace

Module compose(const Module& module, const std::string& name, const Composition& tree, const VerifyOptions& verifying) {
  check_composition(tree, "compose");
  check_tasks(tree, "compose");
  Draft draft = open_grafted(module, "compose");
  check_free_name(draft, name);
  for (const NamedComposition& other : draft.compositions) {
    const std::vector<std::string> parts = adapters_in(tree);
    TORCH_CHECK(std::find(parts.begin(), parts.end(), other.name) == parts.end(), "compose: '", name, "', ",
                composition_to_string(tree), ", uses '", other.name, "', which is a composition, ",
                composition_to_string(other.tree), "; name its adapters");
  }
  const std::vector<std::string> added = add_composition(draft, {name, tree, std::nullopt});
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
      reason = verify_results(both, with_drawn_weights(both, adapters, adapters), verifying.example, weights, added,
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

std::vector<int64_t> task_ids(const Module& module, const std::string& name) {
  check_grafted(module, "task_ids");
  const Module adapters_module = module.attr("adapters").toModule();
  const std::vector<NamedComposition> compositions = read_compositions(adapters_module);
  const auto found = std::find_if(compositions.begin(), compositions.end(), [&](const NamedComposition& composition) {
    return composition.name == name && has_multi_task(composition.tree);
  });
  TORCH_CHECK(found != compositions.end(), "task_ids: '", name, "' is no composition with a MultiTask of the module; ",
              "list_adapters names its compositions");
  return ids_of_tasks(found->tree, adapter_names(adapters_module), compositions, "task_ids");
}

}  // namespace torchgraft
