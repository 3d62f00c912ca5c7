#pragma once

#include <torchgraft/patch/canonicalise/raise_attention.h>
#include <torchgraft/patch/graph/graph_utils.h>
#include <torchgraft/registration/export.h>

#include <torch/csrc/jit/api/module.h>

namespace torchgraft {

// One flat graph of a method in which every attention that could be recognised is an
// aten::scaled_dot_product_attention at the top level. It computes what the method computes, up to rounding.
struct CanonicalGraph {
  std::shared_ptr<torch::jit::Graph> graph;
  std::vector<UnraisedSoftmax> unraised;
  std::vector<ModuleAttribute> folded;  // attributes that the graph took for constants
};

// kAsItIs leaves attention that is written out so: a query that may attend to no key then gives what it gave. Raised,
// it attends to what its scores say without the mask.
enum class AttentionForm { kRaised, kAsItIs };

// Canonicalises the method `method_name` of `module`, which stays unchanged.
CanonicalGraph canonicalise(const torch::jit::Module& module, const std::string& method_name,
                            AttentionForm attention = AttentionForm::kRaised);

// Returns a copy of `module` whose forward is the canonical graph, without any adapter. For tests and for inspection.
TORCHGRAFT_PATCH_API torch::jit::Module canonical_module(const torch::jit::Module& module);

}  // namespace torchgraft
