#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <unordered_map>
#include <vector>

namespace torchgraft {

// What computes with the elements of one tensor of a module in a graph.
struct TensorReads {
  std::vector<torch::jit::Node*> linears;  // whose weight is the tensor, or some of its rows (weight_source)
  std::vector<torch::jit::Node*> others;
};

// The reads of all tensors that are attributes of `root`, in sub-blocks too. `graph` is a method of `root` with its
// calls inlined. A node that takes a module, a list or a dict (a call that was not inlined, a fork) counts as a read of
// all tensors in it. A tensor with two paths (tied parameters) has one entry; tensors that only share memory have one
// each.
std::unordered_map<const c10::TensorImpl*, TensorReads> tensor_reads(torch::jit::Graph& graph,
                                                                     const torch::jit::Module& root);

}  // namespace torchgraft
