#include "encoder.h"
#include "support.h"

#include <torchgraft/config/config_string.h>
#include <torchgraft/patch/graft.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::error_of;
using testing::make_module;

// One attention over x [B, S, 12]; `before` makes y of x, and `behind` the result of z.
torch::jit::Module around(const std::string& before, const std::string& behind = "    return z\n") {
  return make_module(
      {{"q", at::randn({12, 12})}, {"k", at::randn({12, 12})}, {"v", at::randn({12, 12})}, {"o", at::randn({12, 12})}},
      "def heads(self, x: Tensor, weight: Tensor) -> Tensor:\n"
      "    return torch.linear(x, weight).unflatten(-1, [3, 4]).transpose(1, 2)\n"
      "def forward(self, x: Tensor, numbers: Tensor) -> Tensor:\n" +
          before +
          "    a = torch.scaled_dot_product_attention(self.heads(y, self.q), self.heads(y, self.k), "
          "self.heads(y, self.v))\n"
          "    z = y + torch.linear(a.transpose(1, 2).flatten(2), self.o)\n" +
          behind);
}

std::string refusal(const torch::jit::Module& module, bool verify = true) {
  GraftOptions options;
  options.verify = verify;
  return error_of([&] { graft(module, {{"task", config_from_string("lora[r=2]")}}, options); });
}

TEST(RowOrder, NamesWhatMovesRows) {
  const std::pair<const char*, const char*> moved[] = {
      {"index", "    y = x[numbers.argsort()]\n"},
      {"index_select", "    y = x.index_select(0, numbers.argsort())\n"},
      {"gather", "    y = x.gather(0, numbers.argsort().view(-1, 1, 1).expand_as(x))\n"},
      {"flip", "    y = x.flip([0]) * 2.0\n"},
      {"roll", "    y = x.roll(1, 0)\n"},
      {"flip", "    y = x.flip([-3])\n"},
      {"index", "    y = x[torch.arange(x.size(0) - 1, -1, -1)]\n"},
      {"sort", "    y = torch.sort(x, dim=0)[0]\n"},
      {"slice", "    half = x.size(0) // 2\n    y = torch.cat([x[half:], x[:half]])\n"},
      {"chunk", "    a, b = x.chunk(2)\n    y = torch.cat([b, a], 0)\n"},
  };
  for (const auto& [name, before] : moved) {
    const std::string error = refusal(around(before));
    EXPECT_NE(error.find("rows reach layer 0 in another order"), std::string::npos) << name << ": " << error;
    EXPECT_NE(error.find(std::string("aten::") + name), std::string::npos) << error;
    EXPECT_EQ(refusal(around(before), /*verify=*/false), "") << "adapters that all rows use together";
  }
}

TEST(RowOrder, LeavesWhatKeepsRows) {
  const char* kept[] = {
      "    y = x.flip([1])\n",                                     // tokens
      "    y = x.index_select(1, torch.arange(x.size(1)))\n",      // tokens
      "    y = torch.cat([x, x * 2.0])\n",                         // rows behind rows
      "    y = torch.cat([x[:, 1:], x[:, :1]], 1)\n",              // tokens
      "    y = x[torch.arange(x.size(0))]\n",                      // each row once, in order
      "    y = x + torch.sin(numbers.float()).sort()[0].sum()\n",  // one number for all rows
      "    y = x.clone()\n    y[numbers > 3] = 0.0\n",
      "    y = x.masked_fill((numbers > 3).view(-1, 1, 1), 0.0)\n",
  };
  for (const char* before : kept) {
    EXPECT_EQ(refusal(around(before)), "") << before;
  }
  EXPECT_EQ(refusal(around("    y = x * 1.0\n", "    return z[numbers.argsort()]\n"), /*verify=*/false), "");
}

}  // namespace
}  // namespace torchgraft
