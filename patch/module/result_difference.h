#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <functional>
#include <optional>
#include <string>

namespace torchgraft {

// The coarsest dtype that `graph` of `module` computes in: of its weights, and of casts that it names.
at::ScalarType coarsest_dtype(torch::jit::Graph& graph, const torch::jit::Module& module);

// The difference of two results of a module: tensors, or tuples, lists and dicts of them.
//
// Tensors of floating-point and complex numbers are compared number by number. What two orders of the same arithmetic
// may differ by depends on the dtype, and is relative to the number itself or to the tensor's usual numbers, the larger
// of the two: values that fill in, such as -1e9 for a hidden word, are no measure for the rest. Infinities and NaN must
// stand at the same places. Integers and booleans must be equal; rounding can move them where they are positions of
// largest numbers and the like.
class ResultDifference {
 public:
  // `dtype`: the coarsest that the results were computed in (coarsest_dtype).
  ResultDifference(at::ScalarType dtype, const c10::IValue& expected, const c10::IValue& actual);

  bool is_too_large() const { return structure_differs_ || integers_differ_ || excess_ > 1; }
  // A shape, a dtype or how results are nested differs, which no rounding does.
  bool is_of_structure() const { return structure_differs_; }
  // Rounding alone may be the cause.
  bool is_of_integers_only() const { return integers_differ_ && !structure_differs_ && excess_ <= 1; }
  // "by 0.3 (at most 2e-05 is rounding)".
  std::string text() const;
  // What could not be compared, when nothing else differs; empty: everything was.
  std::string not_compared() const;

 private:
  void add(const c10::IValue& expected, const c10::IValue& actual);
  void add_all(const std::vector<c10::IValue>& expected, const std::vector<c10::IValue>& actual);
  void add_tensors(const at::Tensor& expected, const at::Tensor& actual);
  void add_numbers(const at::Tensor& wanted, const at::Tensor& got, double tolerance);

  at::ScalarType coarsest_;
  bool has_compared_ = false;
  bool structure_differs_ = false;
  bool integers_differ_ = false;
  double excess_ = 0;      // the largest difference in units of what is allowed
  double difference_ = 0;  // that difference
  double allowed_ = 0;     // what is allowed there
};

// What was not compared (empty: all was) of two results whose difference rounding explains; nullopt: it does not.
// `dtype`: as above. `in_double` runs both once more in float64, where rounding moves no step (a top-k, a router) to
// another side. It throws where a graph names its dtype and does not run in another one.
std::optional<std::string> explained_by_rounding(const ResultDifference& difference, at::ScalarType dtype,
                                                 const std::function<ResultDifference()>& in_double);

bool all_finite(const c10::IValue& value);
bool has_nan(const c10::IValue& value);

}  // namespace torchgraft
