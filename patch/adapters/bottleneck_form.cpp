#include <torchgraft/patch/adapters/bottleneck_form.h>

#include <c10/util/Exception.h>

namespace torchgraft {
namespace {

const char* to_string(BottleneckInput input) {
  switch (input) {
    case BottleneckInput::kBranch:
      return "seq";
    case BottleneckInput::kNormedSum:
      return "seq_ln";
    case BottleneckInput::kResidual:
      return "par";
  }
  TORCH_INTERNAL_ASSERT(false, "unknown bottleneck input");
}

}  // namespace

BottleneckForm bottleneck_form(const PlannedBottleneck& planned) {
  const BnConfig& config = planned.config;
  BottleneckForm form;
  form.wiring = planned.wiring;
  form.input = config.is_parallel          ? BottleneckInput::kResidual
               : config.original_ln_before ? BottleneckInput::kNormedSum
                                           : BottleneckInput::kBranch;
  const auto* is_before = std::get_if<bool>(&config.residual_before_ln);
  if (form.input == BottleneckInput::kNormedSum && !(is_before && *is_before)) {
    form.residual = is_before ? BottleneckResidual::kNormedSum : BottleneckResidual::kSum;
  }
  form.norm_before = config.ln_before;
  form.norm_after = config.ln_after;
  form.residual_in_norm = config.ln_after && config.adapter_residual_before_ln && !config.is_parallel;
  form.replaces_norm = !config.original_ln_after;
  form.scaling_is_trained = std::holds_alternative<std::string>(config.scaling);
  form.non_linearity = config.non_linearity;
  return form;
}

std::string to_string(const BottleneckForm& form) {
  std::string result = to_string(form.input);
  result += form.wiring == BottleneckWiring::kExchanged     ? "_exchanged"
            : form.wiring == BottleneckWiring::kAfterOthers ? "_after_others"
                                                            : "";
  result += form.residual == BottleneckResidual::kSum         ? "_add"
            : form.residual == BottleneckResidual::kNormedSum ? "_normed"
                                                              : "";
  result += form.norm_before ? "_norm_before" : "";
  result += form.norm_after ? (form.residual_in_norm ? "_norm_all" : "_norm_after") : "";
  result += form.replaces_norm ? "_last" : "";
  result += form.scaling_is_trained ? "_scaled" : "";
  return result + "_" + form.non_linearity;
}

}  // namespace torchgraft
