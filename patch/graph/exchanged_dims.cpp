#include <torchgraft/patch/graph/exchanged_dims.h>

#include <torchgraft/patch/graph/graph_utils.h>

#include <numeric>
#include <utility>

namespace torchgraft {

std::optional<std::vector<size_t>> exchanged_dims(SymbolicShapes& shapes, const torch::jit::Node* node, size_t rank) {
  std::vector<size_t> result(rank);
  std::iota(result.begin(), result.end(), 0);
  if (is_aten(node, {"transpose", "swapaxes", "swapdims"})) {
    const auto a = position(node->input(1), rank);
    const auto b = position(node->input(2), rank);
    if (!a || !b) {
      return std::nullopt;
    }
    std::swap(result[*a], result[*b]);
    return result;
  }
  if (is_aten(node, {"t", "numpy_T"}) && rank == 2) {
    return std::vector<size_t>{1, 0};
  }
  const auto order = is_aten(node, {"permute"}) ? shapes.integers(node->namedInput("dims")) : std::nullopt;
  if (!order || order->size() != rank) {
    return std::nullopt;
  }
  for (size_t i = 0; i < rank; ++i) {
    const int64_t at = (*order)[i].factor < 0 ? (*order)[i].factor + static_cast<int64_t>(rank) : (*order)[i].factor;
    if (at < 0 || at >= static_cast<int64_t>(rank)) {
      return std::nullopt;
    }
    result[i] = at;
  }
  return result;
}

}  // namespace torchgraft
