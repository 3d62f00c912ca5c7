#include "model.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <map>
#include <stdexcept>

namespace {

// The first tensor of a result that may be a tuple or a dictionary (transformers' models return those).
at::Tensor first_tensor(const c10::IValue& value) {
  if (value.isTensor()) {
    return value.toTensor();
  }
  if (value.isTuple() && !value.toTupleRef().elements().empty()) {
    return first_tensor(value.toTupleRef().elements()[0]);
  }
  if (value.isGenericDict() && !value.toGenericDict().empty()) {
    return first_tensor(value.toGenericDict().begin()->value());
  }
  throw std::runtime_error("the model returned no tensor but a " + value.tagKind());
}

// A tensor [n], or [tokens, n].
Output read_output(const at::Tensor& tensor) {
  const at::Tensor values = tensor.to(at::kFloat).contiguous();
  const auto* first = values.const_data_ptr<float>();
  return {{first, first + values.numel()}, values.dim() == 2 ? values.size(1) : 0};
}

}  // namespace

size_t longest_row(const TokenRows& rows) {
  size_t longest = 0;
  for (const auto& row : rows) {
    longest = std::max(longest, row.size());
  }
  return longest;
}

Signature::Signature(const torch::jit::Module& module, int64_t pad_id, Package* package)
    : inputs_(module), limits_(torchgraft::text_limits(module)), pad_id_(pad_id), package_(package) {}

Signature::Result Signature::run(const torch::jit::Module& module, const TokenRows& rows,
                                 const std::vector<int64_t>& adapter_ids) const {
  std::map<size_t, std::vector<int64_t>, std::greater<>> lengths;  // to the numbers of the rows, the longest first
  for (size_t i = 0; i < rows.size(); ++i) {
    lengths[rows[i].size()].push_back(static_cast<int64_t>(i));
  }
  if (inputs_.takes_mask() || lengths.size() == 1) {
    return run_padded(module, rows, adapter_ids);
  }
  Result all;
  for (const auto& [length, numbers] : lengths) {
    TokenRows some;
    std::vector<int64_t> ids;
    for (const int64_t number : numbers) {
      some.push_back(rows[static_cast<size_t>(number)]);
      ids.push_back(adapter_ids[static_cast<size_t>(number)]);
    }
    const Result part = run_padded(module, some, ids);
    if (!all.states.defined()) {
      std::vector<int64_t> shape = part.states.sizes().vec();
      shape[0] = static_cast<int64_t>(rows.size());
      all = {at::zeros(shape, part.states.options()), at::zeros({shape[0], part.mask.size(1)}, at::kLong)};
    }
    const at::Tensor places = at::tensor(numbers, at::kLong);
    all.states.narrow(1, 0, part.states.size(1)).index_copy_(0, places, part.states);
    all.mask.narrow(1, 0, part.mask.size(1)).index_copy_(0, places, part.mask);
  }
  return all;
}

Signature::Result Signature::run_padded(const torch::jit::Module& module, const TokenRows& rows,
                                        const std::vector<int64_t>& adapter_ids) const {
  const auto batch = static_cast<int64_t>(rows.size());
  const auto longest = static_cast<int64_t>(std::max(longest_row(rows), package_ ? package_->least_tokens() : 0));
  const at::Tensor ids = at::full({batch, longest}, pad_id_, at::kLong);
  const at::Tensor mask = at::zeros({batch, longest}, at::kLong);
  for (int64_t i = 0; i < batch; ++i) {
    const auto& row = rows[static_cast<size_t>(i)];
    std::copy(row.begin(), row.end(), ids.data_ptr<int64_t>() + i * longest);
    std::fill_n(mask.data_ptr<int64_t>() + i * longest, row.size(), 1);
  }
  const std::vector<c10::IValue> arguments = inputs_.arguments({ids, mask});
  const at::Tensor adapters = at::tensor(adapter_ids, at::kLong);
  const at::Tensor result =
      (package_ ? package_->run(arguments, adapters)
                : first_tensor(module.get_method("forward")(arguments, {{"adapter_ids", adapters}})))
          .to(at::kFloat);
  TORCH_CHECK(result.dim() >= 2 && result.dim() <= 3 && result.size(0) == batch,
              "the model returned a tensor of shape ", result.sizes(), " for ", batch,
              " rows; this server answers [rows, tokens, hidden] and [rows, n]");
  return {result, mask};
}

Outputs pool_states(const at::Tensor& states, const TokenRows& rows, Pooling pooling) {
  Outputs outputs;
  for (size_t i = 0; i < rows.size(); ++i) {
    const at::Tensor row = states[static_cast<int64_t>(i)];
    if (row.dim() == 1) {
      outputs.push_back(read_output(row));
    } else {
      const auto tokens = static_cast<int64_t>(rows[i].size());
      outputs.push_back(read_output(pooling == Pooling::kMean ? row.narrow(0, 0, tokens).mean(0) : row[0]));
    }
  }
  return outputs;
}

Outputs read_logits(const at::Tensor& logits, const TokenRows& rows) {
  Outputs outputs;
  for (size_t i = 0; i < rows.size(); ++i) {
    const at::Tensor row = logits[static_cast<int64_t>(i)];
    outputs.push_back(read_output(row.dim() == 2 ? row.narrow(0, 0, static_cast<int64_t>(rows[i].size())) : row));
  }
  return outputs;
}
