#include "support.h"

#include <torchgraft/activations/activation.h>
#include <torchgraft/patch/canonicalise/decompose_linear.h>
#include <torchgraft/patch/insert/fuse_linear.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::count_kind;
using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

constexpr const char* kOperator = "torchgraft::linear";

// forward(x) = `result`, where y is a linear map of x and w and b its parameters. `before`: what stands above.
torch::jit::Module module_of(const std::string& result, const std::string& before = "") {
  at::manual_seed(0);
  return make_module({{"w", at::randn({40, 6})}, {"b", at::randn({40})}}, R"(
def forward(self, x: Tensor) -> Tensor:
    y = torch.linear(x, self.w, self.b)
)" + before + "    return " + result + "\n");
}

struct Fused {
  explicit Fused(const torch::jit::Module& module) : graph(module.get_method("forward").graph()->copy()) {
    count = fuse_linear(graph, module);
    graph->lint();
    const at::Tensor x = at::randn({2, 20, 6});
    const auto run = [&](const auto& of) { return run_graph(module, of, {x}).toTensor(); };
    const at::Tensor wanted = run(module.get_method("forward").graph());
    difference = largest_difference(run(graph), wanted);
    const auto back = graph->copy();
    decompose_linear(back);
    back->lint();
    left = count_kind(*back, kOperator);
    difference_back = largest_difference(run(back), wanted);
  }
  std::shared_ptr<torch::jit::Graph> graph;
  size_t count = 0;
  double difference = 0.0;
  size_t left = 0;               // operators after decomposing
  double difference_back = 0.0;  // of the decomposed graph
};

// Writes another function's name into the operator.
void name_function(torch::jit::Graph& graph, const std::string& name) {
  for (torch::jit::Node* node : graph.nodes()) {
    if (node->kind().toQualString() == std::string(kOperator)) {
      const torch::jit::WithInsertPoint guard(node);
      node->replaceInput(3, graph.insertConstant(name));
    }
  }
}

TEST(FuseLinear, TakesTheFunctionThatFollows) {
  const std::pair<const char*, const char*> functions[] = {
      {"torch.gelu(y)", "aten::gelu"}, {"torch.gelu(y, approximate=\"tanh\")", "aten::gelu"},
      {"torch.relu(y)", "aten::relu"}, {"torch.silu(y)", "aten::silu"},
      {"torch.tanh(y)", "aten::tanh"}, {"torch.sigmoid(y)", "aten::sigmoid"}};
  for (const auto& [source, kind] : functions) {
    SCOPED_TRACE(source);
    const Fused fused(module_of(source));
    EXPECT_EQ(fused.count, 1u);
    EXPECT_EQ(count_kind(*fused.graph, kOperator), 1u);
    EXPECT_EQ(count_kind(*fused.graph, kind), 0u);
    EXPECT_LT(fused.difference, 1e-5);
    EXPECT_EQ(fused.left, 0u);
    EXPECT_EQ(fused.difference_back, 0.0);
  }
}

TEST(FuseLinear, LeavesAFunctionThatIsNotAloneOrNotAfterIt) {
  const std::pair<const char*, const char*> others[] = {{"torch.gelu(y) + y", "aten::gelu"},
                                                        {"torch.relu(x).sum() + y", "aten::relu"},
                                                        {"torch.mish(y)", "aten::mish"},
                                                        {"torch.relu_(y)", "aten::relu_"}};
  for (const auto& [source, kind] : others) {
    SCOPED_TRACE(source);
    const Fused fused(module_of(source));
    EXPECT_EQ(fused.count, 1u);
    EXPECT_EQ(count_kind(*fused.graph, kind), 1u);
    EXPECT_LT(fused.difference, 1e-5);
    EXPECT_EQ(fused.difference_back, 0.0);
  }
}

TEST(FuseLinear, LeavesAFunctionThatRunsOnlySometimes) {
  const Fused fused(module_of("z", "    z = x\n    if bool(x.sum() > 0):\n        z = torch.relu(y)\n"));
  EXPECT_EQ(count_kind(*fused.graph, "aten::relu"), 1u);
  EXPECT_LT(fused.difference, 1e-5);
}

TEST(FuseLinear, LeavesAWeightThatIsNoParameterOrNotDense) {
  for (const char* weight : {"self.w * 2.0", "self.w.to_sparse()", "self.w[0]"}) {
    SCOPED_TRACE(weight);
    const auto module = make_module({{"w", at::randn({40, 6})}}, std::string(R"(
def forward(self, x: Tensor) -> Tensor:
    return torch.linear(x, )") + weight + ")\n");
    const auto graph = module.get_method("forward").graph()->copy();
    EXPECT_EQ(fuse_linear(graph, module), 0u);
  }
  const auto sparse = make_module({{"w", at::randn({40, 6}).to_sparse()}}, R"(
def forward(self, x: Tensor) -> Tensor:
    return torch.linear(x, self.w)
)");
  EXPECT_EQ(fuse_linear(sparse.get_method("forward").graph()->copy(), sparse), 0u);
}

// ATen's linear adds a bias of one number to all outputs.
TEST(FuseLinear, LeavesABiasOfAnotherSize) {
  for (const int64_t size : {1, 40}) {
    const auto module = make_module({{"w", at::randn({40, 6})}, {"b", at::randn({size})}}, R"(
def forward(self, x: Tensor) -> Tensor:
    return torch.linear(x, self.w, self.b)
)");
    const Fused fused(module);
    EXPECT_EQ(fused.count, size == 1 ? 0u : 1u);
    EXPECT_LT(fused.difference, 1e-5);
  }
}

TEST(DecomposeLinear, WritesEveryFunctionThatTheOperatorKnows) {
  const auto module = make_module({{"w", at::randn({40, 6})}}, R"(
def forward(self, x: Tensor) -> Tensor:
    return torch.linear(x, self.w)
)");
  for (const std::string& name : non_linearity_names()) {
    SCOPED_TRACE(name);
    const auto graph = module.get_method("forward").graph()->copy();
    ASSERT_EQ(fuse_linear(graph, module), 1u);
    name_function(*graph, name);
    const auto back = graph->copy();
    decompose_linear(back);
    back->lint();
    EXPECT_EQ(count_kind(*back, kOperator), 0u);
    const at::Tensor x = at::randn({2, 20, 6});
    EXPECT_LT(largest_difference(run_graph(module, back, {x}).toTensor(), run_graph(module, graph, {x}).toTensor()),
              1e-5);
  }
}

TEST(DecomposeLinear, NamesAFunctionThatThereIsNot) {
  const auto module = make_module({{"w", at::randn({40, 6})}}, R"(
def forward(self, x: Tensor) -> Tensor:
    return torch.linear(x, self.w)
)");
  const auto graph = module.get_method("forward").graph()->copy();
  ASSERT_EQ(fuse_linear(graph, module), 1u);
  name_function(*graph, "step");
  EXPECT_NE(testing::error_of([&] { decompose_linear(graph); }).find("linear: expected non_linearity to be one of"),
            std::string::npos);
}

}  // namespace
}  // namespace torchgraft
