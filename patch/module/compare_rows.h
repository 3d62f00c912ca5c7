#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <vector>

namespace torchgraft {

// Whether an adapter of row 0 alone has changed other rows' results, and not row 0's: the module moves its rows.
//
// `of_base` and `of_adapter`: a module's results with the base and with the adapter in all rows; `of_row`: with the
// adapter in row 0. Tensors in them are compared where a dimension has `rows` sizes; of several such dimensions one
// that fits is enough. A module whose rows depend on each other changes row 0 and others: nothing can be said then, and
// the answer is false.
bool moves_rows(const c10::IValue& of_base, const c10::IValue& of_adapter, const c10::IValue& of_row, int64_t rows);

// What a module must give when row 0 alone has a composition whose Parallel makes `channels` rows of one: of
// `of_base`, and of `of_adapter`, whose rows all have it. Tensors without a dimension that holds the rows, or with
// several that may, are left out of this, and of `of_row`.
std::vector<at::Tensor> with_first_repeated(const c10::IValue& of_base, const c10::IValue& of_adapter,
                                            std::vector<at::Tensor>& of_row, int64_t rows, int64_t channels);

// The tensors of floating-point numbers in a result, in float64.
std::vector<at::Tensor> tensors_in(const c10::IValue& result);

}  // namespace torchgraft
