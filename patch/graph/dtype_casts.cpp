#include <torchgraft/patch/graph/dtype_casts.h>

#include <torchgraft/patch/graph/graph_utils.h>

namespace torchgraft {

using torch::jit::Node;
using torch::jit::Value;

bool is_dtype_cast(const Node* node) {
  if (!is_aten(node, {"to"}) || !node->maybeSchema()) {
    return false;
  }
  const std::string& overload = node->schema().overload_name();
  return (overload == "dtype" || overload == "prim_dtype") && !is_none(node->namedInput("dtype"));
}

bool is_cast_like(const Node* node) {
  return is_aten(node, {"type_as"}) ||
         (is_aten(node, {"to"}) && node->maybeSchema() && node->schema().overload_name() == "other");
}

Value* strip_casts(Value* value) {
  while (is_dtype_cast(value->node()) || is_cast_like(value->node())) {
    value = value->node()->namedInput("self");
  }
  return value;
}

void ResultType::cast(const Node* node) {
  if (is_dtype_cast(node)) {
    current_ = relative(const_cast<Value*>(node->namedInput("dtype")));
  } else {
    cast_like(const_cast<Value*>(node->namedInput("other")));
  }
}

void ResultType::promote(Value* operand) {
  Value* other = dtype_of(operand);
  if (other != current_) {
    current_ = graph_->insert(c10::Symbol::aten("promote_types"), {absolute(current_), absolute(other)});
  }
}

Value* ResultType::apply() {
  return current_ ? graph_->insert(c10::aten::to, {value_, current_, false, false}) : value_;
}

Value* ResultType::dtype_of(Value* value) {
  if (is_dtype_cast(value->node())) {
    return relative(value->node()->namedInput("dtype"));
  }
  return value == input_ ? nullptr : graph_->insert(c10::prim::dtype, {value});
}

Value* ResultType::relative(Value* dtype) {
  const bool of_input = dtype->node()->kind() == c10::prim::dtype && dtype->node()->input() == input_;
  return of_input ? nullptr : dtype;
}

Value* ResultType::absolute(Value* dtype) { return dtype ? dtype : graph_->insert(c10::prim::dtype, {input_}); }

}  // namespace torchgraft
