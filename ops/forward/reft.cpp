#include <ATen/ATen.h>
#include <torch/library.h>
#include <torchgraft/activations/activation.h>
#include <torchgraft/ops/bank.h>
#include <torchgraft/ops/check.h>
#include <torchgraft/ops/forward/reft.h>
#include <torchgraft/ops/from_schema.h>
#include <torchgraft/ops/kernel_choice.h>
#include <torchgraft/ops/reft.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

namespace torchgraft::ops {
namespace {

// One unit of the parameters, of one slice of the banks or (dense, mixed) of each row's.
struct ReftUnit {
  at::Tensor source_weight;  // [(B,) r, H]
  at::Tensor source_bias;    // [(B,) r]
  at::Tensor projection;     // [(B,) r, H]
  at::Tensor subtraction;    // [], or [B, 1, 1]
};

// x [..., H], changed.
at::Tensor intervene(const at::Tensor& x, const ReftUnit& unit, const Activation& activation) {
  const at::Tensor source = project(x, unit.source_weight) + unit.source_bias.unsqueeze(-2);
  const at::Tensor hidden = activation.forward(source) - project(x, unit.projection) * unit.subtraction;
  return x + at::matmul(hidden, unit.projection);
}

// Where each slice of the banks acts: (unit, slice) -> tokens, as positions in x [B S, H]. Unit 1 comes last.
using Places = std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>>;

class PlaceFinder {
 public:
  PlaceFinder(const ReftArguments& args, const Selection& selection)
      : positions_(args.positions.contiguous()),
        mask_(args.real_tokens().defined() ? args.real_tokens().contiguous() : at::Tensor()),
        selection_(selection),
        rows_(selection.is_mixed() ? selection.rows.contiguous() : at::Tensor()),
        active_(selection.is_mixed() ? selection.active.contiguous() : at::Tensor()),
        tokens_(args.x.size(1)) {}

  Places find(int64_t batch) const {
    Places places;
    for (int64_t row = 0; row < batch; ++row) {
      const int64_t slice = slice_of(row);
      if (slice >= 0) {
        add(row, slice, places);
      }
    }
    return places;
  }

 private:
  int64_t slice_of(int64_t row) const {
    if (!selection_.is_mixed()) {
      return selection_.slice;
    }
    return active_.const_data_ptr<bool>()[row] ? rows_.const_data_ptr<int64_t>()[row] : -1;
  }

  void add(int64_t row, int64_t slice, Places& places) const {
    const int64_t prefix = positions_.const_data_ptr<int64_t>()[2 * slice];
    const int64_t suffix = positions_.const_data_ptr<int64_t>()[2 * slice + 1];
    TORCH_CHECK(prefix == 0 || suffix <= tokens_, ReftArguments::kOperator, ": expected at least ", suffix,
                " tokens, as many as there are suffix positions beside prefix positions, got ", tokens_,
                ": the adapters library mixes up the positions of such a batch; pad it");
    int64_t begin = 0;
    int64_t end = tokens_;
    if (mask_.defined()) {
      const bool* real = mask_.const_data_ptr<bool>() + row * tokens_;
      const bool* first = std::find(real, real + tokens_, true);
      begin = first == real + tokens_ ? 0 : first - real;
      end = begin + std::count(real, real + tokens_, true);
    }
    // A bank holds any int64.
    append(row, begin, begin + std::clamp<int64_t>(prefix, 0, tokens_), places[{0, slice}]);
    append(row, end - std::clamp<int64_t>(suffix, 0, tokens_), end, places[{1, slice}]);
  }

  void append(int64_t row, int64_t begin, int64_t end, std::vector<int64_t>& places) const {
    for (int64_t token = std::max<int64_t>(begin, 0); token < std::min(end, tokens_); ++token) {
      places.push_back(row * tokens_ + token);
    }
  }

  at::Tensor positions_;
  at::Tensor mask_;
  const Selection& selection_;
  at::Tensor rows_;
  at::Tensor active_;
  int64_t tokens_;
};

// Reads the changed tokens only. Undefined where there are none.
at::Tensor sparse_reft(const ReftArguments& args, const Selection& selection, const Activation& activation,
                       bool recording) {
  const at::Tensor x = args.x.reshape({-1, args.x.size(2)});
  at::Tensor output;
  for (const auto& [key, tokens] : PlaceFinder(args, selection).find(args.x.size(0))) {
    if (tokens.empty()) {
      continue;
    }
    const auto [unit, slice] = key;
    const auto of = [&, u = unit == 0 ? 0 : -1, n = slice](const at::Tensor& bank) {
      return bank.select(0, n).select(0, u);
    };
    const at::Tensor index = at::tensor(tokens, at::kLong);
    const at::Tensor changed = intervene(
        x.index_select(0, index),
        {of(args.source_weight), of(args.source_bias), of(args.projection), args.subtraction.select(0, slice)},
        activation);
    if (recording) {
      output = at::index_copy(output.defined() ? output : x, 0, index, changed);
    } else {
      output = output.defined() ? output : at::clone(x, at::MemoryFormat::Contiguous);
      output.index_copy_(0, index, changed);
    }
  }
  return output.defined() ? output.view(args.x.sizes()) : output;
}

// Computes all tokens, and reads no values of ids and masks.
at::Tensor dense_reft(const ReftArguments& args, const Selection& selection, const Activation& activation) {
  const at::Tensor& x = args.x;
  const auto long_options = args.positions.options();
  const at::Tensor counts =  // [1 or B, 2]
      select(selection, args.positions).reshape({-1, 2}).clamp_min(0).clamp_max(c10::Scalar(x.sym_size(1)));
  const at::Tensor tokens = at::arange(c10::Scalar(x.sym_size(1)), long_options).unsqueeze(0);
  at::Tensor begin = at::zeros({1, 1}, long_options);
  at::Tensor end = at::full({1, 1}, c10::Scalar(x.sym_size(1)), long_options);
  if (args.real_tokens().defined()) {
    const at::Tensor real = args.real_tokens();
    begin = real.cumsum(1).eq(0).sum(1, /*keepdim=*/true) * real.any(1, /*keepdim=*/true);  // 0 without a real token
    end = begin + real.sum(1, /*keepdim=*/true);
  }
  const at::Tensor at_prefix = tokens.ge(begin).logical_and(tokens.lt(begin + counts.narrow(1, 0, 1)));
  const at::Tensor at_suffix = tokens.ge(end - counts.narrow(1, 1, 1)).logical_and(tokens.lt(end));
  const at::Tensor subtraction = select(selection, args.subtraction).unsqueeze(-1).unsqueeze(-1);
  const at::Tensor source_weight = select(selection, args.source_weight);
  const at::Tensor source_bias = select(selection, args.source_bias);
  const at::Tensor projection = select(selection, args.projection);
  at::Tensor output = x;
  for (const auto& [unit, is_here] : {std::pair(0, at_prefix), std::pair(-1, at_suffix)}) {
    const ReftUnit parameters = {source_weight.select(-3, unit), source_bias.select(-2, unit),
                                 projection.select(-3, unit), subtraction};
    output = at::where(is_here.unsqueeze(-1), intervene(x, parameters, activation), output);
  }
  return output.contiguous();
}

at::Tensor reft_forward(const ReftArguments& args) {
  check(args);
  return composed_reft(args, /*recording=*/false);
}

TORCH_LIBRARY_IMPL(torchgraft, CompositeExplicitAutograd, m) {
  m.impl("reft", from_schema<ReftArguments, reft_forward, decltype(reft)>);
}

}  // namespace

at::Tensor composed_reft(const ReftArguments& args, bool recording) {
  const Selection selection = resolve_selection(args.kOperator, args.rows(), args.source_weight, recording);
  const Activation& activation = find_activation(args.non_linearity, args.kOperator);
  if (selection.kind == Selection::Kind::kBase) {
    return at::clone(args.x, at::MemoryFormat::Contiguous);
  }
  if (has_memory(args.x)) {
    const at::Tensor output = sparse_reft(args, selection, activation, recording);
    if (output.defined()) {
      return output;
    }
    if (!recording) {
      return at::clone(args.x, at::MemoryFormat::Contiguous);
    }
  }
  return dense_reft(args, selection, activation);  // where nothing changes, parameters get gradients of zeros
}

}  // namespace torchgraft::ops
