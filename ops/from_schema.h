#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace torchgraft::ops {

// The dispatcher calls a kernel with the arguments of the schema, one by one: Tensor? comes as optional<Tensor>, str as
// string_view, SymInt[] as SymIntArrayRef. Kernels of ours take them as one struct of arguments.h. This file turns one
// into the other, so that no kernel repeats the list.

// One argument of the dispatcher's as the member that holds it.
inline const at::Tensor& as_member(const at::Tensor& tensor) { return tensor; }
inline at::Tensor as_member(const std::optional<at::Tensor>& tensor) { return tensor.value_or(at::Tensor()); }
inline std::string as_member(std::string_view text) { return std::string(text); }
inline std::vector<c10::SymInt> as_member(c10::SymIntArrayRef numbers) { return numbers.vec(); }
template <typename Number>  // int, float, bool, float?
Number as_member(Number number) {
  return number;
}

// `Arguments` is an aggregate whose members are those of the schema, in its order. The last ones lie in a nested struct
// (RowArguments, and in it GateParameters): C++ lets the inner braces of an aggregate be left out, so the flat list
// below fills the nested members too. An argument too many or of another type does not compile; two of one type in the
// wrong order do, and the tests of the operator's values fail.
template <typename Arguments, typename... Ts>
Arguments as_struct(const Ts&... arguments) {
  return Arguments{as_member(arguments)...};
}

// FromSchema<Arguments, kernel, Signature>::call has the operator's own Signature, R(Ts...), which the dispatcher
// asks for, and calls R kernel(const Arguments&).
template <typename Arguments, auto kernel, typename Signature>
struct FromSchema;

template <typename Arguments, auto kernel, typename R, typename... Ts>
struct FromSchema<Arguments, kernel, R(Ts...)> {
  static R call(Ts... arguments) { return kernel(as_struct<Arguments>(arguments...)); }
};

// What Library::impl takes, as in: m.impl("gated_lora", from_schema<LoraArguments, forward, decltype(gated_lora)>);
template <typename Arguments, auto kernel, typename Signature>
constexpr TORCH_FN_TYPE((&FromSchema<Arguments, kernel, Signature>::call)) from_schema{};

}  // namespace torchgraft::ops
