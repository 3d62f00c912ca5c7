#include <torchgraft/patch/module/failure_hints.h>

#include <torchgraft/patch/canonicalise/decompose_fused_encoder.h>

#include <ATen/ATen.h>

namespace torchgraft {

using torch::jit::Module;

std::string other_dtypes(const Module& base, at::ScalarType coarsest, const at::TensorOptions& weights) {
  const auto own = c10::typeMetaToScalarType(weights.dtype());
  std::string other;
  for (const auto& parameter : base.named_parameters()) {
    const at::ScalarType dtype = parameter.value.scalar_type();
    if (at::isFloatingType(dtype) && dtype != own) {
      other = c10::str(parameter.name, " is ", dtype);
      break;
    }
  }
  if (other.empty() && coarsest == at::kHalf && own != at::kHalf && own != at::kBFloat16) {
    other = "its forward casts to 16 bits, as under torch.autocast";
  }
  return other.empty() ? ""
                       : c10::str("; adapters are ", own, ", as the first query projection, but ", other,
                                  ": trace the base without torch.autocast and with all weights in one dtype");
}

bool refuses_mixed_rows(const std::string& error) {
  return error.find("rows of one batch cannot have different adapters") != std::string::npos ||
         error.find("expected rows with prompts of one length") != std::string::npos;
}

std::string fused_encoder_hint(const Module& base, const std::string& method) {
  return may_run_fused_encoder(*base.get_method(method).graph())
             ? "; the base takes torch's fused encoder layers, which hide every token whose "
               "float mask is not 0: give it a bool mask, or one of 0 and -inf"
             : "";
}

}  // namespace torchgraft
