#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <memory>

namespace torchgraft {

// A linear map whose weight [in, out] the model holds transposed, as Hugging Face's Conv1D does. Canonicalising writes
// it as linear(x, t(w), b). A module that runs it that way makes two views more in each pass than the model did, and
// torch.jit.freeze no longer makes `mm` and a sum of it.

// Writes linear(x, t(w), b) as addmm(b, x.reshape(-1, in), w).view(x.size()[:-1] + [out]), for parameters and constants
// w of rank 2 and b of rank 1. Numbers are equal up to rounding: TorchScript makes `mm` and a sum of an addmm whose
// shapes it knows.
void write_addmm_form(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

// Writes what write_addmm_form() has made as linear maps again, for those who read the graph.
void read_addmm_form(const std::shared_ptr<torch::jit::Graph>& graph, const torch::jit::Module& module);

}  // namespace torchgraft
