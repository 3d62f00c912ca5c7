#include <torchgraft/patch/graph/tensor_reads.h>

#include <torchgraft/patch/graph/graph_utils.h>

namespace torchgraft {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Use;
using torch::jit::Value;

class ReadFinder {
 public:
  explicit ReadFinder(const Module& root) : root_(root) {}

  // `value` holds `held`: a module, a list, a tensor, ...
  void follow(Value* value, const c10::IValue& held) {
    if (held.isTensor()) {
      follow_tensor(value, held.toTensor());
      return;
    }
    for (const Use& use : data_uses(value)) {
      Node* user = use.user;
      if (user->kind() == c10::prim::GetAttr && held.isObject()) {
        follow(user->output(), held.toObjectRef().getAttr(user->s(c10::attr::name)));
      } else {
        add_all(held, user);
      }
    }
  }

  std::unordered_map<const c10::TensorImpl*, TensorReads> reads;

 private:
  // `value` is `tensor`, or rows of it.
  void follow_tensor(Value* value, const at::Tensor& tensor) {
    for (const Use& use : data_uses(value)) {
      Node* user = use.user;
      if (is_aten(user, {"linear"}) && user->namedInput("weight") == value && use.offset == 1 &&
          weight_source(value, root_).tensor.is_same(tensor)) {
        reads[tensor.unsafeGetTensorImpl()].linears.push_back(user);
      } else if (leads_on(user) && use.offset == 0) {
        for (Value* output : user->outputs()) {
          follow_tensor(output, tensor);
        }
      } else if (!asks_only(user)) {
        reads[tensor.unsafeGetTensorImpl()].others.push_back(user);
      }
    }
  }

  // Questions beside those that data_uses() leaves out: torch.nn asks them before its fused encoder.
  static bool asks_only(const Node* node) {
    const std::string kind = node->kind().toQualString();
    return kind.starts_with("prim::is_") || kind == "prim::requires_grad" || kind == "prim::layout" ||
           is_aten(node, {"__is__", "__isnot__", "is_contiguous", "is_leaf"});
  }

  // The nodes that weight_source() goes back through.
  static bool leads_on(const Node* node) {
    return is_layout(node) || node->kind() == c10::prim::ListUnpack || node->kind() == c10::aten::__getitem__ ||
           is_aten(node, {"t", "numpy_T", "chunk", "split", "split_with_sizes", "slice", "narrow"});
  }

  void add_all(const c10::IValue& held, Node* user) {
    held.visit([&](const c10::IValue& part) {
      if (part.isTensor() && part.toTensor().defined()) {
        reads[part.toTensor().unsafeGetTensorImpl()].others.push_back(user);
      }
      return false;
    });
  }

  const Module& root_;
};

}  // namespace

std::unordered_map<const c10::TensorImpl*, TensorReads> tensor_reads(Graph& graph, const Module& root) {
  ReadFinder finder(root);
  finder.follow(graph.inputs()[0], root._ivalue());
  return std::move(finder.reads);
}

}  // namespace torchgraft
