#include <torchgraft/patch/module/graft_options.h>

#include <torchgraft/patch/adapters/read_adapters.h>
#include <torchgraft/patch/module/rename_names.h>

#include <algorithm>

namespace torchgraft {

using torch::jit::Module;

InsertOptions insert_options(const GraftOptions& options, const Module& module) {
  if (!options.gate_pooling.empty()) {
    check_gate_pooling(options.gate_pooling, "graft");
  }
  InsertOptions result;
  if (options.token_mask_input.empty()) {
    return result;
  }
  std::string names;
  const auto& arguments = module.get_method("forward").function().getSchema().arguments();
  for (size_t i = 1; i < arguments.size(); ++i) {
    names += (names.empty() ? "" : ", ") + arguments[i].name();
    if (arguments[i].name() != options.token_mask_input) {
      continue;
    }
    TORCH_CHECK(arguments[i].type()->isSubtypeOf(*c10::TensorType::get()), "graft: the token mask input '",
                options.token_mask_input, "' must be a Tensor, got ", arguments[i].type()->repr_str());
    result.token_mask_input = i;
  }
  TORCH_CHECK(result.token_mask_input, "graft: forward has no argument '", options.token_mask_input,
              "'; it has: ", names);
  return result;
}

GraftOptions options_like(const Module& grafted, GraftOptions options) {
  const Module adapters = grafted.attr("adapters").toModule();
  const std::string mask = adapters.attr("token_mask_input").toStringRef();
  const std::vector<AdapterConfig> configs = read_configs(adapters);
  const bool reads_mask = std::any_of(configs.begin(), configs.end(), reads_token_mask);
  TORCH_CHECK(options.token_mask_input.empty() || options.token_mask_input == mask || !reads_mask,
              "graft: the module's token mask is ", mask.empty() ? "each attention's own" : "'" + mask + "'",
              "; all its adapters share that");
  options.token_mask_input = options.token_mask_input.empty() ? mask : options.token_mask_input;
  const bool was_fused = !adapters.hasattr("fused") || adapters.attr("fused").toBool();  // older files do not say
  options.fuse = options.fuse && was_fused;
  // Files of before partial grafts had to be asked for hold what was accepted.
  const bool was_accepted = !adapters.hasattr("allow_partial") || adapters.attr("allow_partial").toBool();
  options.allow_partial = options.allow_partial || was_accepted;
  const NewNames names = remembered_names(grafted);
  TORCH_CHECK(options.rename.empty() || options.rename == names,
              "graft: names of the base were chosen when the module was grafted first; leave rename out, or graft the ",
              "base anew");
  options.rename = names;
  const auto sites = remembered_sites(grafted);
  TORCH_CHECK(!options.sites || (sites && to_json(*sites) == to_json(*options.sites)),
              "graft: the module was grafted with ", sites ? "other" : "detected",
              " sites, which all its adapters share; graft the base anew to change them");
  options.sites = sites;
  return options;
}

std::optional<Structure> remembered_sites(const Module& grafted) {
  const std::string& json = grafted.attr("adapters").toModule().attr("sites").toStringRef();
  return json.empty() ? std::nullopt : std::optional(structure_from_json(json));
}

}  // namespace torchgraft
