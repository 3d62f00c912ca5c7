#pragma once

#include "support.h"

#include <torchgraft/patch/graph/graph_utils.h>

#include <gtest/gtest.h>

// For tests of passes that rewrite linear maps of x [2, 5, 6].
namespace torchgraft::testing {

// The result and the gradients of x and of all parameters.
inline std::vector<at::Tensor> run_with_gradients(torch::jit::Module& module,
                                                  const std::shared_ptr<torch::jit::Graph>& graph) {
  at::manual_seed(1);
  const at::Tensor x = at::randn({2, 5, 6}).requires_grad_();
  const at::Tensor out = run_graph(module, graph, {x}).toTensor();
  (out * at::arange(out.numel()).view_as(out).sin()).sum().backward();
  std::vector<at::Tensor> results = {out, x.grad()};
  for (at::Tensor parameter : module.parameters()) {
    results.push_back(parameter.grad().defined() ? parameter.grad() : at::zeros({1}));
    parameter.mutable_grad() = at::Tensor();
  }
  return results;
}

inline void expect_same_results(torch::jit::Module& module, const std::shared_ptr<torch::jit::Graph>& graph) {
  const auto expected = run_with_gradients(module, module.get_method("forward").graph());
  const auto actual = run_with_gradients(module, graph);
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_LT(largest_difference(expected[i], actual[i]), 1e-5) << "of result " << i;
    EXPECT_EQ(expected[i].sizes(), actual[i].sizes());
  }
}

// The one linear map at the top level of the graph. Null when there is none; fails when there are several.
inline const torch::jit::Node* only_linear(const torch::jit::Graph& graph) {
  const torch::jit::Node* linear = nullptr;
  for (const torch::jit::Node* node : graph.nodes()) {
    if (is_aten(node, {"linear"})) {
      EXPECT_EQ(linear, nullptr) << "several linear maps";
      linear = node;
    }
  }
  return linear;
}

}  // namespace torchgraft::testing
