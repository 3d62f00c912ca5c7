#include "support.h"

#include <torchgraft/patch/canonicalise/remove_writes.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>

#include <gtest/gtest.h>

namespace torchgraft {
namespace {

using testing::largest_difference;
using testing::make_module;
using testing::run_graph;

struct Case {
  const char* name;
  const char* body;
  size_t writers;  // that are left
};

size_t count_writers(const torch::jit::Graph& graph) {
  size_t count = 0;
  for_each_node(const_cast<torch::jit::Graph&>(graph).block(),
                [&](torch::jit::Node* node) { count += is_writer(node) && node->kind().is_aten(); });
  return count;
}

class RemoveWrites : public ::testing::TestWithParam<Case> {};

// In source that is compiled in C++ dtypes are numbers: 15 is bfloat16, 6 float.
// Both see the input as it was, and leave it as the module leaves it.
TEST_P(RemoveWrites, KeepsResultsAndLeavesOnlyWhatOthersSee) {
  auto module =
      make_module({}, std::string("def forward(self, x: Tensor, mask: Optional[Tensor], n: int):\n") + GetParam().body);
  const auto before = module.get_method("forward").graph();
  const auto after = before->copy();
  remove_writes(after);
  after->lint();
  EXPECT_EQ(count_writers(*after), GetParam().writers) << *after;
  at::manual_seed(0);
  const at::Tensor x = at::randn({3, 4, 5});
  const at::Tensor mask = at::rand({3, 1, 5}) < 0.5;
  for (const c10::IValue& given : {c10::IValue(mask), c10::IValue()}) {
    const at::Tensor left = x.clone();
    const at::Tensor right = x.clone();
    const at::Tensor expected = run_graph(module, before, {left, given, 2}).toTensor();
    EXPECT_EQ(largest_difference(run_graph(module, after, {right, given, 2}).toTensor(), expected), 0.0);
    EXPECT_EQ(largest_difference(right, left), 0.0);
  }
}

INSTANTIATE_TEST_SUITE_P(Removed, RemoveWrites,
                         ::testing::Values(Case{"the_tensor_itself", R"python(
    y = x * 2
    y.add_(1)
    return y + x
)python",
                                                0},
                                           Case{"in_a_branch", R"python(
    y = x * 2
    if mask is not None:
        y.masked_fill_(mask, -1e9)
    return torch.softmax(y, -1)
)python",
                                                0},
                                           Case{"in_nested_branches_and_before_them", R"python(
    y = x * 2
    y.mul_(3)
    if mask is not None:
        y.add_(1)
        if n > 1:
            y.masked_fill_(mask, 0.5)
    return y - 1
)python",
                                                0},
                                           Case{"two_writes_into_one_view", R"python(
    y = x * 2
    v = y[..., :2]
    v.mul_(0.5)
    v.mul_(6.0)
    return y.sum(-1) + v.sum(-1)
)python",
                                                0},
                                           Case{"a_view_then_the_whole_then_the_view", R"python(
    y = x * 2
    v = y.transpose(1, 2)[..., 0]
    v.add_(1)
    y.mul_(2)
    v.mul_(3)
    return y.sum(1) + v
)python",
                                                1},
                                           Case{"a_comparison_keeps_the_dtype", R"python(
    y = x * 2
    y.gt_(0.5)
    y.logical_not_()
    return y * 0.25
)python",
                                                0},
                                           Case{"an_element_of_a_dimension", R"python(
    y = x * 2
    y[..., 0] = 7.0
    return torch.softmax(y, -1)
)python",
                                                0},
                                           Case{"a_slice_of_a_transposed_view", R"python(
    y = x * 2
    z = y.view(3, 2, 2, 5).transpose(1, 2)
    z[:, :, 1:] *= 3
    return y.sum(1)
)python",
                                                0},
                                           Case{"a_view_that_is_read_behind", R"python(
    y = x * 2
    z = y.select(0, 1)
    z.mul_(3)
    return y + z
)python",
                                                0},
                                           Case{"by_index_put", R"python(
    y = x * 2
    y[torch.tensor([0, 2])] = 1.5
    return y
)python",
                                                0},
                                           Case{"by_a_wider_number", R"python(
    y = torch.full_like(x, 2.0, dtype=15)
    y.add_(x)
    return y.to(6)
)python",
                                                0},
                                           Case{"copied_and_the_source_changed", R"python(
    y = x * 2
    z = x * 3
    y.copy_(z)
    z.add_(1)
    return y + z
)python",
                                                0}),
                         [](const auto& info) { return info.param.name; });

INSTANTIATE_TEST_SUITE_P(Kept, RemoveWrites,
                         ::testing::Values(Case{"the_callers_tensor", R"python(
    x.add_(1)
    return x * 2
)python",
                                                1},
                                           Case{"what_another_view_reads", R"python(
    y = x * 2
    z = y.reshape(12, 5)
    y.mul_(3)
    return z.sum(0)
)python",
                                                1},
                                           Case{"in_a_loop", R"python(
    y = x * 2
    for i in range(n):
        y.add_(i)
    return y
)python",
                                                1},
                                           Case{"behind_a_dropout_that_drops_nothing", R"python(
    y = x * 2
    z = torch.dropout(y, 0.1, False)
    z.add_(1)
    return y + z
)python",
                                                1},
                                           Case{"before_a_cast_to_the_same_dtype", R"python(
    y = x * 2
    z = y.type_as(x)
    y.add_(1)
    return y + z
)python",
                                                1},
                                           Case{"behind_two_operators_that_return_their_operand", R"python(
    y = x * 2
    z = torch.einsum("ijk", [torch.atleast_2d(y)])
    z.add_(1)
    return y + z
)python",
                                                1},
                                           Case{"sizes", R"python(
    y = x * 2
    v = y[0]
    v.unsqueeze_(0)
    return v + y
)python",
                                                1},
                                           Case{"what_is_read_by_its_strides", R"python(
    y = x.transpose(0, 1) * 2
    y[0].add_(1)
    return torch.as_strided(y, [3], [1])
)python",
                                                1},
                                           Case{"a_view_that_is_read_behind_the_branch", R"python(
    y = x * 2
    v = y[..., :2]
    if mask is not None:
        v.mul_(3)
    return y.sum(-1) + v.sum(-1)
)python",
                                                1},
                                           Case{"what_a_list_holds", R"python(
    y = x * 2
    kept = [y]
    y.mul_(3)
    return kept[n - 2]
)python",
                                                1}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace torchgraft
