#pragma once

#include <torchgraft/patch/adapters/fusions.h>
#include <torchgraft/patch/insert/composer.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace torchgraft {

// A frozen AdapterFusion layer over frozen bottlenecks, with its products taken together: nothing in it is as wide as
// two hidden sizes any more. With R rows for each of n adapters:
//   d = f(down x + down_bias)                                 what the bottlenecks hold, [n R]
//   [s, o] = score q + score_bias                             [n R] and [n]
//   p = softmax(sum over R of d s + o)                        the shares of the adapters, [n]
//   result = up (p d) + p up_bias
struct FoldedFusion {
  int64_t adapters = 0;
  std::string non_linearity;
  at::Tensor down, down_bias, score, score_bias, up, up_bias;
};

// Folds the layer's weights into those of the adapters, in float64. nullopt where that cannot be, or costs more: the
// layer or an adapter is trained, has a norm of its own or another non-linearity than the others, the residual goes
// into the values, weights have less than 32 bits, or the bottlenecks are wide.
std::optional<FoldedFusion> fold_fusion(const AdapterFusion& fusion, const ModuleWeights& layer,
                                        const std::vector<ComposedPart>& parts);

}  // namespace torchgraft
