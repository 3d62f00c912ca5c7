#include <torchgraft/plan/phm.h>

#include <ATen/ATen.h>

namespace torchgraft {

at::Tensor phm_weight(const BnConfig& config, const PhmShape& shape, const PhmFactors& given) {
  const int64_t n = config.phm_dim;
  const auto factors = [&](const char* name, at::IntArrayRef wanted, bool shared) {
    const at::Tensor factor = given(name, wanted, shared);
    TORCH_CHECK(factor.sizes() == wanted, "plan: Compacter's ", name, " has the shape ", factor.sizes(), " where ",
                wanted,
                " is needed; factors that all modules share (shared_W_phm) need one reduction_factor for all layers");
    return factor;
  };
  TORCH_CHECK(shape.in % n == 0 && shape.out % n == 0, "plan: phm_dim=", n,
              " must divide the sizes of the bottleneck's projections, but one is from ", shape.in, " to ", shape.out,
              "; choose another phm_dim or reduction_factor");
  at::Tensor blocks;  // [n, in / n, out / n]
  if (config.factorized_phm_W) {
    // Left before right: the order in which the library draws them.
    const at::Tensor left = factors("W_left", {n, shape.in / n, config.phm_rank}, config.shared_W_phm);
    blocks = at::bmm(left, factors("W_right", {n, config.phm_rank, shape.out / n}, config.shared_W_phm));
  } else {
    blocks = factors("W", {n, shape.in / n, shape.out / n}, config.shared_W_phm);
  }
  at::Tensor rules;  // [n, n, n]
  if (config.factorized_phm_rule) {
    const at::Tensor left = factors("phm_rule_left", {n, n, 1}, config.shared_phm_rule);
    rules = at::bmm(left, factors("phm_rule_right", {n, 1, n}, config.shared_phm_rule));
  } else {
    rules = factors("phm_rule", {n, n, n}, config.shared_phm_rule);
  }
  // sum over i of kron(rules[i], blocks[i]): [n, in / n, n, out / n]
  const at::Tensor sum = at::einsum("iab,icd->acbd", {rules, blocks});
  return sum.reshape({shape.in, shape.out}).t().contiguous();
}

PhmSource phm_place(const PlannedModule& module, const std::string& side, const std::string& factor, bool shared) {
  if (shared) {
    return {kSharedPhm, factor.starts_with("W") ? "W_" + side + factor.substr(1) : factor};
  }
  return {"layer_" + std::to_string(module.number) + "_" + module.site, side + "_" + factor};
}

bool has_phm_factors(const PlannedModule& module, const Reparametrisation& sources) {
  const auto* bottleneck = std::get_if<PlannedBottleneck>(&module.method);
  if (!bottleneck || !bottleneck->config.phm_layer) {
    return false;
  }
  const PhmSource block =
      phm_place(module, "down", bottleneck->config.factorized_phm_W ? "W_left" : "W", bottleneck->config.shared_W_phm);
  const auto found = sources.find(block.source);
  return found != sources.end() && found->second.count(block.name);
}

ModuleWeights phm_weights(const PlannedModule& module, const Reparametrisation& sources) {
  const auto& planned = std::get<PlannedBottleneck>(module.method);
  const auto [hidden, size] = std::pair(planned.hidden_size, planned.bottleneck_size);
  ModuleWeights weights;
  for (const PhmShape& shape : {PhmShape{hidden, size, "down"}, PhmShape{size, hidden, "up"}}) {
    weights[shape.side + std::string("_weight")] =
        phm_weight(planned.config, shape, [&](const std::string& factor, at::IntArrayRef, bool shared) {
          const PhmSource place = phm_place(module, shape.side, factor, shared);
          return sources.at(place.source).at(place.name);
        });
  }
  return weights;
}

}  // namespace torchgraft
