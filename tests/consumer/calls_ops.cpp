// Calls an operator from C++ and compares it with its formula. Exit status 0 when they agree.

#include <torchgraft/ops/activation.h>
#include <torchgraft/ops/attention_token_mask.h>
#include <torchgraft/ops/gated_bottleneck.h>
#include <torchgraft/ops/gated_lora.h>
#include <torchgraft/ops/gated_prefix_attention.h>
#include <torchgraft/ops/reft.h>
#include <torchgraft/registration/error_text.h>
#include <torchgraft/registration/export.h>
#include <torchgraft/registration/library.h>

#include <ATen/ATen.h>

#include <iostream>
#include <string>

int main() {
  const auto options = at::TensorOptions(at::kDouble);
  const at::Tensor x = at::randn({2, 5, 8}, options);
  const at::Tensor base = at::randn({2, 5, 6}, options);
  const at::Tensor a = at::randn({1, 3, 8}, options);
  const at::Tensor b = at::randn({1, 6, 3}, options);
  const at::Tensor scaling = at::full({1}, 0.25, options);
  const auto [output, gate] = torchgraft::ops::gated_lora(x, base, a, b, scaling);
  const at::Tensor expected = base + 0.25 * x.matmul(a[0].t()).matmul(b[0].t());
  if (!at::allclose(output, expected) || !at::equal(gate, at::ones({2, 1}, options))) {
    std::cerr << "gated_lora: expected\n" << expected << "\ngot\n" << output << "\ngate " << gate << "\n";
    return 1;
  }
  const at::Tensor unit = at::randn({1, 1, 3, 8}, options);
  const at::Tensor first = at::tensor({1, 0}, at::kLong).view({1, 2});
  const at::Tensor changed =
      torchgraft::ops::reft(x, unit, at::zeros({1, 1, 3}, options), unit, at::zeros({1}, options), first, "relu");
  const at::Tensor token = x.select(1, 0);
  const at::Tensor change = token.matmul(unit[0][0].t()).relu().matmul(unit[0][0]);
  if (!at::allclose(changed.select(1, 0), token + change) || !at::equal(changed.slice(1, 1), x.slice(1, 1))) {
    std::cerr << "reft: expected the first token to be\n" << token + change << "\ngot\n" << changed << "\n";
    return 1;
  }
  try {
    torchgraft::ops::gated_lora(x, base, a.slice(2, 0, 7), b, scaling);
    std::cerr << "gated_lora took a lora_a of a wrong shape\n";
    return 1;
  } catch (const c10::Error& error) {
    std::cout << torchgraft::version() << " " << torchgraft::one_line(error) << "\n";
  }
  return 0;
}
