#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torchgraft/ops/bank.h>

#include <algorithm>

namespace torchgraft::ops {
namespace {

// stand_in: the slice that base rows read; what is computed from it is dropped.
Selection mixed(const at::Tensor& ids, bool has_base, int64_t stand_in = 0) {
  Selection selection;
  selection.kind = Selection::Kind::kMixed;
  selection.rows = has_base ? ids.masked_fill(at::lt(ids, 0), stand_in) : ids;
  selection.active = at::ge(ids, 0);
  selection.has_base = has_base;
  return selection;
}

Selection uniform(int64_t slice) {
  Selection selection;
  selection.kind = slice < 0 ? Selection::Kind::kBase : Selection::Kind::kUniform;
  selection.slice = slice;
  return selection;
}

Selection read_ids(const char* op, const at::Tensor& ids, int64_t adapters, bool recording) {
  const at::Tensor contiguous = ids.contiguous();
  const int64_t* first = contiguous.const_data_ptr<int64_t>();
  const int64_t* last = first + contiguous.numel();
  const int64_t* wrong = std::find_if(first, last, [adapters](int64_t id) { return id < -1 || id >= adapters; });
  TORCH_CHECK(wrong == last, op, ": expected adapter_ids in [-1, ", adapters, "), got ", *wrong, " in row ",
              wrong - first);
  const bool allowed = first != last && (*first >= 0 || !recording);
  if (allowed && std::all_of(first, last, [first](int64_t id) { return id == *first; })) {
    return uniform(*first);
  }
  // A slice that the batch uses: another thread may be writing any other one (AdapterPool).
  const int64_t* used = std::find_if(first, last, [](int64_t id) { return id >= 0; });
  return mixed(ids, std::find(first, last, -1) != last, used == last ? 0 : *used);
}

}  // namespace

Selection resolve_selection(const char* op, const RowArguments& args, const at::Tensor& bank, bool recording) {
  if (!args.adapter_ids.defined()) {
    return uniform(args.adapter);
  }
  const at::Tensor& ids = args.adapter_ids;
  if (at::isTensorSubclassLike(ids)) {
    return mixed(ids, /*has_base=*/true);
  }
  if (ids.is_cpu()) {
    return read_ids(op, ids, bank.size(0), recording);
  }
  at::_assert_async(at::logical_and(at::ge(ids, -1), at::lt(ids, bank.size(0))).all(),
                    c10::str(op, ": expected adapter_ids in [-1, ", bank.size(0), "), got an id outside"));
  return mixed(ids, /*has_base=*/true);
}

at::Tensor select(const Selection& selection, const at::Tensor& bank) {
  TORCH_INTERNAL_ASSERT(selection.kind != Selection::Kind::kBase, "a base selection has no slice of a bank");
  if (!selection.is_mixed()) {
    return bank.select(0, selection.slice);
  }
  return zero_base_rows(selection, bank.index_select(0, selection.rows));
}

at::Tensor select_backward(const Selection& selection, const at::Tensor& bank, const at::Tensor& grad) {
  if (!selection.is_mixed()) {
    return at::select_backward_symint(grad.to(bank.scalar_type()), bank.sym_sizes(), 0, selection.slice);
  }
  const at::Tensor zeros = at::zeros_symint(bank.sym_sizes(), bank.options());
  return zeros.index_add(0, selection.rows, zero_base_rows(selection, grad.to(bank.scalar_type())));
}

at::Tensor zero_base_rows(const Selection& selection, const at::Tensor& per_row) {
  if (!selection.is_mixed() || !selection.has_base) {
    return per_row;
  }
  at::Tensor base = selection.active.logical_not();
  for (int64_t dim = 1; dim < per_row.dim(); ++dim) {
    base = base.unsqueeze(-1);
  }
  return per_row.masked_fill(base, 0);
}

at::Tensor linear_map(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return at::linear(x, weight, bias.defined() ? std::make_optional(bias) : std::nullopt);
}

at::Tensor project(const at::Tensor& x, const at::Tensor& weight) { return at::matmul(x, weight.transpose(-1, -2)); }

void add_projection_(at::Tensor& sum, const at::Tensor& x, const at::Tensor& weight) {
  if (weight.dim() == 3) {
    sum.baddbmm_(x, weight.transpose(1, 2));
  } else {
    sum.flatten(0, 1).addmm_(x.flatten(0, 1), weight.t());
  }
}

at::Tensor reduce_rows(const Selection& selection, const at::Tensor& per_row) {
  return selection.is_mixed() ? per_row : per_row.sum(0);
}

at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 ? at::kFloat : type;
}

}  // namespace torchgraft::ops
