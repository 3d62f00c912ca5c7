#include <ATen/ATen.h>
#include <torchgraft/ops/autograd/norm_output.h>
#include <torchgraft/ops/autograd/support.h>

#include <algorithm>

namespace torchgraft::ops {
namespace {

using Norms = std::vector<c10::intrusive_ptr<torch::autograd::Node>>;  // by saved tensor; null: it is kept

struct NormsHolder : torch::CustomClassHolder {
  explicit NormsHolder(Norms norms) : norms(std::move(norms)) {}
  Norms norms;
};

// Takes the results of layer norms out of `tensors`.
Norms without_norms(torch::autograd::variable_list& tensors) {
  Norms norms;
  for (at::Tensor& tensor : tensors) {
    norms.push_back(norm_that_made(tensor));
    if (norms.back()) {
      tensor = at::Tensor();
    }
  }
  return norms;
}

void with_norms(const Norms& norms, torch::autograd::variable_list& tensors) {
  for (size_t i = 0; i < norms.size(); ++i) {
    if (norms[i]) {
      tensors[i] = output_of_norm(norms[i]);
    }
  }
}

}  // namespace

bool records_gradient(std::initializer_list<at::Tensor> differentiable) {
  return at::GradMode::is_enabled() &&
         std::any_of(differentiable.begin(), differentiable.end(),
                     [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); });
}

std::optional<at::Tensor> or_none(const at::Tensor& tensor) {
  return tensor.defined() ? std::make_optional(tensor) : std::nullopt;
}

void save(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& arguments,
          torch::autograd::variable_list tensors, const Selection& selection, const Gate& gate) {
  // Function::apply gives edges, by which needs_input_grad counts, only to tensors that are present.
  std::vector<int64_t> edges;
  int64_t next = 0;
  for (const at::Tensor& argument : arguments) {
    edges.push_back(argument.defined() ? next++ : -1);
  }
  ctx->saved_data["edges"] = edges;
  ctx->saved_data["norms"] = c10::IValue::make_capsule(c10::make_intrusive<NormsHolder>(without_norms(tensors)));
  for (const at::Tensor& tensor : {selection.rows, selection.active, gate.value, gate.sigmoids, gate.tokens}) {
    tensors.push_back(tensor);
  }
  ctx->save_for_backward(std::move(tensors));
  ctx->saved_data["kind"] = static_cast<int64_t>(selection.kind);
  ctx->saved_data["adapter"] = selection.adapter;
  ctx->saved_data["has_base"] = selection.has_base;
}

Saved restore(const char* op, torch::autograd::AutogradContext* ctx) {
  TORCH_CHECK(!at::GradMode::is_enabled(), op,
              ": expected create_graph=False, got a double backward, which this op "
              "does not support");
  constexpr size_t kShared = 5;
  Saved saved;
  saved.ctx = ctx;
  saved.edges = ctx->saved_data["edges"].toIntVector();
  saved.tensors = ctx->get_saved_variables();
  TORCH_INTERNAL_ASSERT(saved.tensors.size() >= kShared, op, ": the gradient's context is incomplete");
  const auto shared = saved.tensors.end() - kShared;
  saved.selection.kind = static_cast<Selection::Kind>(ctx->saved_data["kind"].toInt());
  saved.selection.adapter = ctx->saved_data["adapter"].toInt();
  saved.selection.has_base = ctx->saved_data["has_base"].toBool();
  saved.selection.rows = shared[0];
  saved.selection.active = shared[1];
  saved.gate = {shared[2], shared[3], shared[4]};
  saved.tensors.resize(saved.tensors.size() - kShared);
  with_norms(static_cast<NormsHolder&>(*ctx->saved_data["norms"].toCapsule()).norms, saved.tensors);
  return saved;
}

bool Saved::needs(size_t argument) const {
  return edges[argument] >= 0 && ctx->needs_input_grad(static_cast<size_t>(edges[argument]));
}

bool Saved::needs_any(std::initializer_list<size_t> arguments) const {
  return std::any_of(arguments.begin(), arguments.end(), [this](size_t argument) { return needs(argument); });
}

at::Tensor accumulate(const at::Tensor& left, const at::Tensor& right) {
  if (!left.defined()) {
    return right;
  }
  return right.defined() ? left + right : left;
}

}  // namespace torchgraft::ops
