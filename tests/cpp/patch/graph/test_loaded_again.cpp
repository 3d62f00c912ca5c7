#include "packed_support.h"
#include "support.h"

#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/loaded_again.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace torchgraft {
namespace {

torch::jit::Module module_with_optional() {
  return testing::make_module({{"w", at::randn({300, 200})}}, R"python(
def forward(self, past: Optional[Tuple[Tensor, Tensor]]) -> Tensor:
    if past is not None:
        return past[0] + self.w
    return self.w
)python");
}

TEST(LoadedAgain, HasTheGraphs) {
  const torch::jit::Module module = module_with_optional();
  const torch::jit::Module loaded = loaded_again(module, "test");
  EXPECT_EQ(testing::count_kind(*loaded.get_method("forward").graph(), "aten::add"), 1U);
  EXPECT_EQ(loaded.attr("w").toTensor().sizes(), module.attr("w").toTensor().sizes());
}

// A sparse or quantised tensor has no strides that could be 0.
TEST(LoadedAgain, TakesTensorsOfEveryLayoutAndSharedModules) {
  at::manual_seed(0);
  const at::Tensor dense = at::randn({300, 200});
  const at::Tensor scales = at::full({300}, 0.1, at::kDouble);
  const std::vector<std::pair<std::string, at::Tensor>> buffers = {
      {"coup", dense.to_sparse()},
      {"csr", dense.to_sparse_csr()},
      {"by_tensor", at::quantize_per_tensor(dense, 0.1, 0, at::kQInt8)},
      {"by_channel", at::quantize_per_channel(dense, scales, at::zeros({300}, at::kLong), 0, at::kQInt8)}};
  torch::jit::Module inner = module_with_optional();
  for (const auto& [name, buffer] : buffers) {
    inner.register_buffer(name, buffer);
  }
  torch::jit::Module module =
      testing::make_packed_module(testing::packed_int8(at::randn({4, 6})), "quantized::linear_dynamic");
  module.register_module("one", inner);
  module.register_module("two", inner);
  const torch::jit::Module loaded = loaded_again(module, "test");
  EXPECT_EQ(testing::count_kind(*loaded.get_method("forward").graph(), "quantized::linear_dynamic"), 1U);
  EXPECT_EQ(loaded.attr("one").toObject(), loaded.attr("two").toObject());
  for (const auto& [name, buffer] : buffers) {
    const at::Tensor actual = loaded.attr("one").toModule().attr(name).toTensor();
    EXPECT_EQ(actual.layout(), buffer.layout()) << name;
    EXPECT_EQ(actual.sizes(), buffer.sizes()) << name;
    EXPECT_EQ(actual.is_quantized(), buffer.is_quantized()) << name;
  }
}

TEST(LoadedAgain, NamesWhatCannotBeCompiled) {
  const torch::jit::Module module = module_with_optional();
  for_each_node(module.get_method("forward").graph()->block(), [](torch::jit::Node* node) {
    if (node->kind() == c10::prim::unchecked_cast) {  // now TupleIndex reads what may be None
      replace_node(node, {node->input(0)});
    }
  });
  try {
    loaded_again(module, "quantize");
    FAIL() << "expected an error";
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    EXPECT_NE(message.find("quantize: the module that was made cannot be loaded"), std::string::npos) << message;
    EXPECT_NE(message.find("is not subscriptable"), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace torchgraft
