#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/headeronly/version.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/ops/gate.h>

#include <tuple>
#include <utility>
#include <vector>

// The functions that the template torch::autograd::Function calls and that differ between torch 2.13 and 2.14. They are
// weak, so that a library for the one loads with the other as far as its own check (registration/check_torch.cpp),
// which names both versions. If they were strong, the loader would stop before and name a mangled symbol.
namespace torch::autograd {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14
[[gnu::weak]] optional_variable_list _wrap_outputs(const variable_list&, const std::unordered_set<at::TensorImpl*>&,
                                                   const std::unordered_set<at::TensorImpl*>&,
                                                   const at::ArrayRef<std::optional<Variable>>,
                                                   const c10::intrusive_ptr<Node>&, const _jvp_fn_t&,
                                                   const std::unordered_set<at::TensorImpl*>&,
                                                   const _view_as_self_fn_t&, bool, c10::intrusive_ptr<Node>&);
[[gnu::weak]] decltype(fire_node_creation_hooks) fire_node_creation_hooks;
#else
[[gnu::weak]] decltype(_wrap_outputs) _wrap_outputs;
#endif
}  // namespace torch::autograd

namespace torchgraft::ops {

// How an operator becomes a node of autograd's graph. What differs between operators stands in a class `Gradient`:
//
//   using Arguments = ...;      the operator's struct of arguments.h
//   template <typename Value>
//   struct Inputs {...};        a Value for each differentiable argument: a tensor, its gradient, or (bool) whether its
//                               gradient is asked for; all() has pointers to them, in the same order for every Value
//   struct Saved {...};         what the gradient needs of the forward pass: selection, gate and gate_parameters, and
//                               more; tensors() has pointers to all other tensors that it holds
//                               (autograd would neither watch nor free one that is left out)
//   static Inputs<at::Tensor> inputs(const Arguments&);
//   static Recorded<Saved> forward(const Arguments&);
//   static Inputs<at::Tensor> backward(const Saved&, const ResultGradients&, const Inputs<bool>& needs);

// An operator's two results, and what it saves. The gate is differentiable if saved.gate.value is defined.
template <typename Saved>
struct Recorded {
  at::Tensor output;
  at::Tensor gate;
  Saved saved;
};

// The gradients of the two results; undefined: that result was not used.
struct ResultGradients {
  at::Tensor output;
  at::Tensor gate;
};

// The part of every Inputs that GateParameters are.
template <typename Value>
struct GateInputs {
  Value weight{};
  Value bias{};
  bool any() const { return weight || bias; }
};

// left + right, where either may be undefined (no gradient).
at::Tensor accumulate(const at::Tensor& left, const at::Tensor& right);

// The node of the layer norm that made a saved tensor, by the tensor's position; null: the tensor itself is saved.
using Norms = std::vector<c10::intrusive_ptr<torch::autograd::Node>>;

// Takes the results of layer norms out of `tensors` (norm_output.h), and computes them again.
Norms take_norm_outputs(torch::autograd::variable_list& tensors);
void restore_norm_outputs(const Norms& norms, torch::autograd::variable_list& tensors);

// Gradients of gradients would silently miss what flows through saved intermediates.
void refuse_double_backward(const char* op);

template <typename Gradient>
class GradientNode : public torch::autograd::Function<GradientNode<Gradient>> {
  using Arguments = typename Gradient::Arguments;
  using IsPresent = typename Gradient::template Inputs<bool>;
  using Saved = typename Gradient::Saved;
  using AutogradContext = torch::autograd::AutogradContext;
  using variable_list = torch::autograd::variable_list;

 public:
  // Dispatched arguments -> (output, gate), with a node in the graph.
  static std::tuple<at::Tensor, at::Tensor> record(const Arguments& args) {
    auto inputs = Gradient::inputs(args);
    IsPresent is_present;
    variable_list present;  // apply() looks for graph edges here, and takes no undefined tensor
    const auto tensors = inputs.all();
    for (size_t i = 0; i < tensors.size(); ++i) {
      *is_present.all()[i] = tensors[i]->defined();
      if (tensors[i]->defined()) {
        present.push_back(*tensors[i]);
      }
    }
    const variable_list results = GradientNode::apply(at::TensorList(present), args, is_present);
    return {results[0], results[1]};
  }

  // Called by torch.
  static variable_list forward(AutogradContext* ctx, at::TensorList /*present*/, const Arguments& args,
                               const IsPresent& is_present) {
    Recorded<Saved> result = Gradient::forward(args);
    ctx->set_materialize_grads(false);
    if (!result.saved.gate.value.defined()) {
      ctx->mark_non_differentiable({result.gate});
    }
    // Autograd keeps the tensors; all else of `saved` waits in a capsule.
    variable_list tensors;
    for (at::Tensor* tensor : tensors_of(result.saved)) {
      tensors.push_back(std::exchange(*tensor, at::Tensor()));
    }
    auto kept = c10::make_intrusive<Kept>();
    kept->norms = take_norm_outputs(tensors);
    kept->is_present = is_present;
    kept->saved = std::move(result.saved);
    ctx->save_for_backward(std::move(tensors));
    ctx->saved_data["kept"] = c10::IValue::make_capsule(std::move(kept));
    return {result.output, result.gate};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward(Arguments::kOperator);
    auto capsule = ctx->saved_data["kept"].toCapsule();
    const auto& kept = static_cast<const Kept&>(*capsule);
    variable_list tensors = ctx->get_saved_variables();
    restore_norm_outputs(kept.norms, tensors);
    Saved saved = kept.saved;
    size_t position = 0;
    for (at::Tensor* tensor : tensors_of(saved)) {
      *tensor = tensors.at(position++);
    }
    IsPresent needs = kept.is_present;
    size_t edge = 0;
    for (bool* need : needs.all()) {
      *need = *need && ctx->needs_input_grad(edge++);
    }
    auto gradients = Gradient::backward(saved, {grads[0], grads[1]}, needs);
    return in_edge_order(gradients, kept.is_present);
  }

 private:
  struct Kept : torch::CustomClassHolder {
    Norms norms;
    IsPresent is_present;
    Saved saved;
  };

  static std::vector<at::Tensor*> tensors_of(Saved& saved) {
    std::vector<at::Tensor*> tensors = saved.tensors();
    tensors.insert(tensors.end(),
                   {&saved.gate_parameters.weight, &saved.gate_parameters.bias, &saved.selection.rows,
                    &saved.selection.active, &saved.gate.value, &saved.gate.sigmoids, &saved.gate.tokens});
    return tensors;
  }

  // As apply() was given its arguments: the present tensors, then two that are none.
  template <typename Gradients>
  static variable_list in_edge_order(Gradients& gradients, IsPresent is_present) {
    variable_list result;
    const auto tensors = gradients.all();
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (*is_present.all()[i]) {
        result.push_back(*tensors[i]);
      }
    }
    result.resize(result.size() + 2);
    return result;
  }
};

inline bool requires_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }
inline bool requires_grad(const std::optional<at::Tensor>& tensor) { return tensor && requires_grad(*tensor); }
template <typename NoTensor>
bool requires_grad(const NoTensor&) {
  return false;
}

inline bool has_tangent(const at::Tensor& tensor) { return tensor.defined() && tensor._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const std::optional<at::Tensor>& tensor) { return tensor && has_tangent(*tensor); }
template <typename NoTensor>
bool has_tangent(const NoTensor&) {
  return false;
}

// Throws c10::NotImplementedError: without a formula for tangents, autograd would take them for zero.
[[noreturn]] void refuse_forward_mode(const char* op);

// The kernel for autograd's key: `record` where a graph is to be recorded; elsewhere the operator `function` is called
// again below autograd, and nothing is saved. record: a function of the struct of arguments, as in from_schema.
template <typename Arguments, auto* function, auto* record, typename Signature>
struct AutogradKernel;

template <typename Arguments, auto* function, auto* record, typename R, typename... Ts>
struct AutogradKernel<Arguments, function, record, R(Ts...)> {
  static R call(Ts... arguments) {
    if ((has_tangent(arguments) || ...)) {
      refuse_forward_mode(Arguments::kOperator);
    }
    if (!at::GradMode::is_enabled() || !(requires_grad(arguments) || ...)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return function(arguments...);
    }
    return record(as_struct<Arguments>(arguments...));
  }
};

// What Library::impl takes: m.impl("gated_lora", autograd_kernel<LoraArguments, gated_lora, record>);
template <typename Arguments, auto* function, auto* record>
constexpr TORCH_FN_TYPE((&AutogradKernel<Arguments, function, record, std::remove_pointer_t<decltype(function)>>::call))
    autograd_kernel{};

}  // namespace torchgraft::ops
