#pragma once

#include <torch/csrc/jit/ir/ir.h>

#include <string>

namespace torchgraft {

// Writes a graph to a file after every pass, if the environment variable TORCHGRAFT_DUMP names a folder; makes the
// folder if need be.
//
// Each GraphDump is one run of a phase and has a folder of its own, DIR/<run>_<phase>. Runs count from 0 in the
// process. The files are <step>_<pass>.txt: diff two neighbours to see what a pass did.
class GraphDump {
 public:
  explicit GraphDump(const std::string& phase);

  // Throws c10::Error when the file cannot be written.
  void operator()(const std::string& pass, const torch::jit::Graph& graph);

 private:
  std::string folder_;  // empty: nothing is dumped
  int step_ = 0;
};

}  // namespace torchgraft
