#include <torchgraft/patch/adapters/dora.h>

#include <torchgraft/patch/sites/base_weight.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace torchgraft {

void complete_dora(Adapter& adapter, const GraphSites& sites, const torch::jit::Module& module) {
  at::NoGradGuard no_grad;
  for (size_t m = 0; m < adapter.plan.size(); ++m) {
    const PlannedModule& planned = adapter.plan[m];
    ModuleWeights& weights = adapter.weights[m];
    const auto* lora = std::get_if<PlannedLoRA>(&planned.method);
    if (!lora || lora_form(lora->config) != LoRAForm::kDora || weights.count("weight_norm")) {
      continue;
    }
    const LinearSite& site = *lora_site(sites.layers.at(sites.structure.position(planned.layer)), planned.site);
    const BaseWeight base = base_weight(site, module);
    TORCH_CHECK(base.packed.empty(), "graft: DoRA on ", planned.site, " of layer ", planned.number,
                " needs the numbers of the projection's weight, which is packed ", base.packed, " (", base.path,
                "); use LoRA there, or graft onto the base in float32");
    TORCH_CHECK(base.tensor.defined(), "graft: DoRA on ", planned.site, " of layer ", planned.number,
                " needs the weight of the projection, which is computed at run time; use LoRA there");
    const at::Tensor weight = base.rows(base.tensor.detach().to(at::kDouble), site, lora->out_features);
    const at::Tensor lora_b = weights.at("lora_b").detach().to(weight);
    // PEFT takes the norm of W + (alpha / r) B A. An adapter of PEFT is read with that factor in B.
    const at::Tensor updated = at::add(weight, at::matmul(lora_b, weights.at("lora_a").detach().to(weight)));
    const auto norms = [&](const at::Tensor& rows) { return at::linalg_vector_norm(rows, 2, at::IntArrayRef{1}); };
    if (!weights.count("magnitude")) {
      weights["magnitude"] = norms(weight).to(weights.at("lora_b").options());
    }
    weights["weight_norm"] = norms(updated).to(weights.at("lora_b").options());
  }
}

}  // namespace torchgraft
