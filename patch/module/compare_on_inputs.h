#pragma once

#include <torchgraft/patch/module/trial_run.h>

#include <functional>
#include <optional>
#include <stdexcept>
#include <string>

namespace torchgraft {

// Thrown by `compare` below: a module fails where the base runs. Inputs that were made up may have a form that nobody
// uses, so that others are tried before this is an error.
struct RunFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The method whose inputs are looked for.
struct BaseForward {
  torch::jit::Module module;  // a copy, which may be run
  const char* method;
  std::shared_ptr<torch::jit::Graph> graph;  // graph_of_run
  std::shared_ptr<torch::jit::Graph> flat;   // the same in canonical form, of the grafted module
  at::TensorOptions weights;                 // dtype and device of its weights
};

// BaseForward::flat of a grafted module. With a Parallel it is the base's, canonicalised anew: the grafted graph
// repeats the rows of an argument first, which hides who reads it.
std::shared_ptr<torch::jit::Graph> flat_graph(const torch::jit::Module& grafted);

// Runs `forward` on `example`, or on inputs that are made up (example_inputs.h), and calls `compare` with the first
// ones that give numbers, and with the result. `compare` returns what it did not compare; empty when nothing was left.
//
// Returns the same, or why nothing was compared, as a sentence: "the result was not compared with <other>: ...", and
// the text of a RunFailure on inputs that were tried before. Throws c10::Error, on behalf of the function `what`, when
// `forward` fails on `example`, and the text of a RunFailure when no inputs do without one.
std::string compare_on_inputs(const BaseForward& forward, const std::optional<Arguments>& example, const char* what,
                              const char* other,
                              const std::function<std::string(const Arguments&, const c10::IValue&)>& compare);

// Calls compare() for a composition that splits inputs, which were made up. Returns what it returns, or, where the
// inputs have no size that the composition splits, that `what` was not compared.
std::string compare_splitting(const std::string& what, const std::function<std::string()>& compare);

}  // namespace torchgraft
