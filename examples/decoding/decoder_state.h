#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <functional>
#include <vector>

// The sequences of a batch, with their keys and values. Padding stands before a sequence, never in it or behind it,
// unless the caller gives some behind it.
struct DecoderState {
  at::Tensor real;                  // bool [B, P]: which tokens are no padding
  std::vector<c10::IValue> caches;  // of tensors [B, heads, P, head size]
  at::Tensor adapter_ids;           // int64 [B]; undefined: the active adapter
  int64_t rows() const { return real.size(0); }
  int64_t tokens() const { return real.size(1); }  // of a row, with its padding
};

// The tensors of a cache, in order.
std::vector<at::Tensor> tensors_of(const c10::IValue& cache);

// A cache of the same form, with `change` of each tensor.
c10::IValue change_tensors(const c10::IValue& cache, const std::function<at::Tensor(const at::Tensor&)>& change);

// These rows, in this order; a row may come several times. Columns that are padding in all of them go.
DecoderState select_rows(const DecoderState& state, const std::vector<int64_t>& rows);

// The rows of `first`, then those of `second`; both are states of one decoder. The shorter ones get padding before
// them.
DecoderState join_rows(const DecoderState& first, const DecoderState& second);
