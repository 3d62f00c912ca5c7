#include <torchgraft/patch/module/reads_back.h>

#include <torchgraft/patch/adapters/make_adapter.h>
#include <torchgraft/patch/graph/no_warnings.h>

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

namespace torchgraft {
namespace {

// The files' numbers are those of the adapter, but for the rounding of factors.
bool has_weights_of(const Adapter& read, const Adapter& saved) {
  if (read.weights.size() != saved.weights.size()) {
    return false;
  }
  for (size_t i = 0; i < read.weights.size(); ++i) {
    for (const auto& [parameter, tensor] : read.weights[i]) {
      const auto found = saved.weights[i].find(parameter);
      const bool is_compared = parameter != "scaling" && found != saved.weights[i].end() &&
                               found->second.sizes() == tensor.sizes() && tensor.is_floating_point();
      if (is_compared && !at::allclose(tensor.to(at::kDouble), found->second.cpu().to(at::kDouble), 1e-2, 1e-4,
                                       /*equal_nan=*/true)) {
        return false;
      }
    }
  }
  return true;
}

std::string why_not_read(const Adapter& adapter, const AdapterConfig& saved, const StateDict& state,
                         const Structure& structure, const std::string& name) {
  const NoWarnings no_warnings;
  try {
    AdapterSpec spec;
    spec.name = name;
    spec.config = saved;
    spec.weights = state;
    const Adapter read = make_adapter(spec, structure, at::TensorOptions(at::kFloat));
    return has_weights_of(read, adapter) ? "" : "its weights would go to other layers";
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
}

}  // namespace

void check_reads_back(const Adapter& adapter, const AdapterConfig& saved, const StateDict& state,
                      const Structure& structure, const std::string& name) {
  const std::string reason = why_not_read(adapter, saved, state, structure, name);
  TORCH_CHECK(reason.empty(), "save_adapter: a directory of '", name,
              "' could not be loaded onto this module again: ", reason,
              "; the module's names are read as the library's: give the layers a list of their own "
              "(\"encoder.layers.0\") before the model is traced or scripted, or keep the grafted file");
}

}  // namespace torchgraft
