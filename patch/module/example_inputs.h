#pragma once

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <string>
#include <vector>

namespace torchgraft {

// Arguments of a forward, self left out, that were made up from the signature and from what the graph does with them.
struct ExampleInputs {
  struct Candidate {
    std::vector<c10::IValue> arguments;
    std::string left_out;  // what a run with these leaves untried, as a sentence for a warning; empty: nothing
  };
  std::vector<Candidate> candidates;  // likeliest first; forward may refuse some
  std::string reason;                 // why there are none
};

// Makes up arguments for `forward` of `module`:
//   the shapes of a trace, where `traced`, its graph as it came, still has them;
//   else token ids [2, S] where an embedding reads the argument, below its number of rows; the second row ends in 0,
//   which is what models usually pad with;
//   images [2, channels, n * stride, n * stride] where a convolution reads the argument, n by the rows of a parameter;
//   a mask [2, S] that pads the second row on its right where the name says "mask", as int64, bool or float; else
//   [2, 1, 1, S] or [2, 1, S, S], as bool or added to scores; else the default, which leaves the mask untried;
//   else float hidden states [2, S, features], `features` being what the first linear map or norm expects, in `dtype`;
//   the default where there is one.
// `flat`: the same graph in canonical form, which shows who reads an argument.
// The numbers are drawn with a fixed seed; the caller's generators stay as they are.
ExampleInputs make_example_inputs(const c10::FunctionSchema& forward, const torch::jit::Graph& traced,
                                  const torch::jit::Graph& flat, const torch::jit::Module& module,
                                  const at::TensorOptions& dtype);

}  // namespace torchgraft
