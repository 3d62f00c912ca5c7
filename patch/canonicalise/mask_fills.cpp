#include <torchgraft/patch/canonicalise/mask_fills.h>

#include <torchgraft/patch/canonicalise/score_path.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/patch/graph/writes.h>
#include <torchgraft/registration/masked_score.h>

#include <torch/csrc/jit/ir/constants.h>

#include <algorithm>
#include <unordered_set>
#include <vector>

namespace torchgraft {
namespace {

using torch::jit::Block;
using torch::jit::Node;
using torch::jit::Value;

// The inputs whose elements `node` reads: not those of which it only takes the size, the dtype or the device.
at::ArrayRef<const Value*> elements_read(const Node* node) {
  const auto inputs = node->inputs();
  if (is_aten(node, {"size", "dim", "numel", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones"}) ||
      node->kind() == c10::prim::dtype || node->kind() == c10::prim::device) {
    return {};
  }
  if (is_aten(node, {"full_like", "new_full"})) {
    return inputs.slice(1);
  }
  return is_aten(node, {"expand_as", "view_as", "reshape_as", "type_as"}) ? inputs.slice(0, 1) : inputs;
}

bool is_computed_from(const Value* value, const Value* source) {
  std::vector<const Value*> frontier = {value};
  std::unordered_set<const Value*> seen = {value};
  for (size_t i = 0; i < frontier.size(); ++i) {
    if (frontier[i] == source) {
      return true;
    }
    const auto add = [&](const Value* next) {
      if (seen.insert(next).second) {
        frontier.push_back(next);
      }
    };
    const Node* node = frontier[i]->node();
    const auto inputs = elements_read(node);
    std::for_each(inputs.begin(), inputs.end(), add);
    for (const Block* block : node->blocks()) {
      std::for_each(block->outputs().begin(), block->outputs().end(), add);
    }
  }
  return false;
}

// Says why the masked_fill or where `node` does not mask. `slope` multiplies what it writes, further on; nullopt when
// it is not known.
std::optional<std::string> why_step_is_no_mask(Node* node, const Node* product, std::optional<double> slope,
                                               const torch::jit::Module& root) {
  const auto value = filled_with(node->input(fill_operand(node)), root);
  if (value && slope && *value * *slope <= kMaskedScore) {
    return std::nullopt;
  }
  const std::string scale = !slope          ? ", scaled by what is not a constant"
                            : *slope != 1.0 ? ", and scales them by " + c10::str(*slope)
                                            : "";
  return described(node) + " sets scores to " + (value ? c10::str(*value) : "what is not a constant") + scale +
         ", which is no mask: expected -inf, or at most " + c10::str(kMaskedScore);
}

// Says what the step `node` makes of the scores beside carrying them: a mask of their own top-k, for instance. Whether
// keys of a prefix would take part in that is not defined.
std::optional<std::string> why_step_reads_scores(Node* node, const Node* product) {
  const bool branches = node->kind() == c10::prim::If;  // the steps in its blocks are visited too
  const std::optional<size_t> carried = branches ? std::nullopt : score_operand(node);
  const auto inputs = elements_read(node);
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (i != carried && is_computed_from(inputs[i], product->output())) {
      return described(node) + (branches ? " decides by the scores themselves what follows"
                                : is_aten(node, {"masked_fill", "where"})
                                    ? " decides by the scores themselves which of them it replaces"
                                    : " changes the scores by what is computed from the scores themselves");
    }
  }
  return std::nullopt;
}

}  // namespace

// masked_fill(scores, mask, value); where(condition, scores, value), or the other way round.
size_t fill_operand(const Node* step) {
  return is_aten(step, {"masked_fill"}) || score_operand(const_cast<Node*>(step)) == 1 ? 2 : 1;
}

std::optional<double> filled_with(const Value* value, const torch::jit::Module& root) {
  if (const auto number = constant_double(value)) {
    return number;
  }
  const Node* node = value->node();
  if (const at::Tensor tensor = resolve_tensor(value, root); tensor.defined()) {
    return tensor.numel() == 1 ? std::optional(tensor.item<double>()) : std::nullopt;
  }
  if (is_aten(node, {"full"})) {
    return filled_with(node->namedInput("fill_value"), root);
  }
  if (is_aten(node, {"tensor", "scalar_tensor", "to", "type_as", "expand", "expand_as", "view"}) ||
      node->kind() == c10::prim::NumToTensor) {
    return filled_with(node->input(0), root);
  }
  return std::nullopt;
}

std::optional<std::string> why_no_mask(const Value* scores, const Node* product, const torch::jit::Module& root) {
  std::optional<std::string> reason;
  for_each_step(scores, product, [&](Node* node, std::optional<double> slope) {
    reason = reason ? reason : why_step_reads_scores(node, product);
    if (!reason && is_aten(node, {"masked_fill", "where"})) {
      reason = why_step_is_no_mask(node, product, slope, root);
    }
  });
  return reason;
}

}  // namespace torchgraft
