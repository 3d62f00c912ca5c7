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
