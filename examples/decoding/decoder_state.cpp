#include "decoder_state.h"

#include <torch/torch.h>

#include <algorithm>

namespace {

using c10::IValue;

void collect(const IValue& cache, std::vector<at::Tensor>& tensors) {
  if (cache.isTensor()) {
    tensors.push_back(cache.toTensor());
  } else if (cache.isTuple()) {
    for (const IValue& element : cache.toTupleRef().elements()) {
      collect(element, tensors);
    }
  } else if (cache.isList()) {
    for (const IValue& element : cache.toListRef()) {
      collect(element, tensors);
    }
  }
}

// With `columns` more before the tokens of dimension `dimension`.
at::Tensor padded(const at::Tensor& tensor, int64_t dimension, int64_t columns) {
  if (columns == 0) {
    return tensor;
  }
  std::vector<int64_t> sizes = tensor.sizes().vec();
  sizes[static_cast<size_t>(dimension)] = columns;
  return torch::cat({torch::zeros(sizes, tensor.options()), tensor}, dimension);
}

}  // namespace

std::vector<at::Tensor> tensors_of(const IValue& cache) {
  std::vector<at::Tensor> tensors;
  collect(cache, tensors);
  return tensors;
}

IValue change_tensors(const IValue& cache, const std::function<at::Tensor(const at::Tensor&)>& change) {
  if (cache.isTensor()) {
    return change(cache.toTensor());
  }
  if (cache.isTuple()) {
    std::vector<IValue> elements;
    for (const IValue& element : cache.toTupleRef().elements()) {
      elements.push_back(change_tensors(element, change));
    }
    return c10::ivalue::Tuple::create(std::move(elements));
  }
  TORCH_INTERNAL_ASSERT(cache.isList(), "a cache is a tensor, a tuple or a list, got ", cache.tagKind());
  const c10::List<IValue> list = cache.toList();
  c10::impl::GenericList elements(list.elementType());
  for (const IValue& element : cache.toListRef()) {
    elements.push_back(change_tensors(element, change));
  }
  return elements;
}

DecoderState select_rows(const DecoderState& state, const std::vector<int64_t>& rows) {
  const c10::InferenceMode no_gradients;
  const at::Tensor index = torch::tensor(rows, torch::kLong);
  const at::Tensor real = state.real.index_select(0, index);
  const at::Tensor columns = real.any(0).nonzero();
  const int64_t start = columns.size(0) > 0 ? columns[0].item<int64_t>() : real.size(1);
  DecoderState result;
  result.real = real.slice(1, start).contiguous();
  for (const IValue& cache : state.caches) {
    result.caches.push_back(
        change_tensors(cache, [&](const at::Tensor& tensor) { return tensor.slice(2, start).index_select(0, index); }));
  }
  if (state.adapter_ids.defined()) {
    result.adapter_ids = state.adapter_ids.index_select(0, index);
  }
  return result;
}

DecoderState join_rows(const DecoderState& first, const DecoderState& second) {
  const c10::InferenceMode no_gradients;
  TORCH_INTERNAL_ASSERT(
      first.caches.size() == second.caches.size() && first.adapter_ids.defined() == second.adapter_ids.defined(),
      "expected states of one decoder");
  const int64_t tokens = std::max(first.tokens(), second.tokens());
  const auto join = [&](const at::Tensor& a, const at::Tensor& b, int64_t dimension) {
    return torch::cat({padded(a, dimension, tokens - first.tokens()), padded(b, dimension, tokens - second.tokens())},
                      0);
  };
  DecoderState result;
  result.real = join(first.real, second.real, 1);
  for (size_t i = 0; i < first.caches.size(); ++i) {
    const std::vector<at::Tensor> others = tensors_of(second.caches[i]);
    size_t next = 0;
    result.caches.push_back(
        change_tensors(first.caches[i], [&](const at::Tensor& tensor) { return join(tensor, others.at(next++), 2); }));
  }
  if (first.adapter_ids.defined()) {
    result.adapter_ids = torch::cat({first.adapter_ids, second.adapter_ids});
  }
  return result;
}
