#pragma once

#include "support.h"

#include <ATen/ATen.h>

// A stack of post-norm encoder layers in TorchScript text: hidden size 12, 3 heads of 4, feed-forward size 20.
namespace torchgraft::testing {

constexpr int64_t kHidden = 12;

inline torch::jit::Module encoder_layer(int64_t feed_forward = 20) {
  const auto weight = [](int64_t out, int64_t in) { return at::randn({out, in}) * 0.4; };
  return make_module({{"q", weight(kHidden, kHidden)},
                      {"k", weight(kHidden, kHidden)},
                      {"v", weight(kHidden, kHidden)},
                      {"o", weight(kHidden, kHidden)},
                      {"up", weight(feed_forward, kHidden)},
                      {"down", weight(kHidden, feed_forward)},
                      {"g1", at::rand({kHidden}) + 0.5},
                      {"g2", at::rand({kHidden}) + 0.5}},
                     R"python(
def heads(self, x: Tensor) -> Tensor:
    return x.view(x.size(0), x.size(1), 3, 4).transpose(1, 2)

def forward(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
    q = self.heads(torch.linear(x, self.q))
    k = self.heads(torch.linear(x, self.k))
    v = self.heads(torch.linear(x, self.v))
    scores = torch.matmul(q, k.transpose(-1, -2)) / 2.0
    if mask is not None:
        scores = scores + mask
    context = torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).reshape(x.size(0), x.size(1), 12)
    x = torch.layer_norm(torch.linear(context, self.o) + x, [12], self.g1)
    return torch.layer_norm(torch.linear(torch.gelu(torch.linear(x, self.up)), self.down) + x, [12], self.g2)
)python");
}

inline torch::jit::Module encoder(int64_t layers = 2) {
  at::manual_seed(0);
  torch::jit::Module module("Encoder");
  module.register_attribute("training", c10::BoolType::get(), false);
  std::string body = "def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:\n";
  for (int64_t i = 0; i < layers; ++i) {
    const std::string name = "layer" + std::to_string(i);
    module.register_module(name, encoder_layer());
    body += "    x = self." + name + ".forward(x, mask)\n";
  }
  module.define(body + "    return x\n");
  return module;
}

}  // namespace torchgraft::testing
