#pragma once

#include <ATen/core/ivalue.h>

#include <cstdint>

namespace torchgraft {

// Whether an adapter of row 0 alone has changed other rows' results, and not row 0's: the module moves its rows.
//
// `of_base` and `of_adapter`: a module's results with the base and with the adapter in all rows; `of_row`: with the
// adapter in row 0. Tensors in them are compared where a dimension has `rows` sizes; of several such dimensions one
// that fits is enough. A module whose rows depend on each other changes row 0 and others: nothing can be said then, and
// the answer is false.
bool moves_rows(const c10::IValue& of_base, const c10::IValue& of_adapter, const c10::IValue& of_row, int64_t rows);

}  // namespace torchgraft
