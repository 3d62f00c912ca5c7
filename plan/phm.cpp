#include <torchgraft/plan/phm.h>

#include <ATen/ATen.h>

namespace torchgraft {

at::Tensor phm_weight(const BnConfig& config, const PhmShape& shape, const PhmFactors& factors) {
  const int64_t n = config.phm_dim;
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

}  // namespace torchgraft
