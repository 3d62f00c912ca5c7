#pragma once

#include <torchgraft/config/fusion_config.h>
#include <torchgraft/plan/module_weights.h>
#include <torchgraft/plan/structure.h>

#include <torch/csrc/jit/api/module.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace torchgraft {

// The AdapterFusion layers of one Fuse, which it finds by their name. A layer's weights are query_weight, query_bias,
// key_weight, key_bias and value_weight, those that the configuration has, by (Layer::number, site). Where it has none
// of them, dense_weight and dense_bias, which the library keeps and does not use.
struct AdapterFusion {
  FusionConfig config;
  std::map<std::pair<int64_t, std::string>, ModuleWeights> weights = {};
  bool trainable = false;  // its weights are parameters of the module, and else buffers

  const std::string& name() const { return config.name; }
};

// The weights of a layer with this configuration on `hidden` features, by name, with their shapes.
std::map<std::string, std::vector<int64_t>> fusion_shapes(const FusionConfig& config, int64_t hidden);

// Whether a weight of that name is kept and not used: the only ones of layers without query, key and value.
bool is_unused(const std::string& weight);

// "folded_0", ...: buffers of an `adapters` module that insert/fold_fusion.h has computed from its weights.
inline constexpr const char* kFoldedBuffer = "folded_";

// Fresh layers at all of these sites ("output_adapter") of the structure. A seeded draw gives the library's numbers.
AdapterFusion fresh_fusion(const FusionConfig& config, const std::set<std::string>& sites, const Structure& structure,
                           const at::TensorOptions& options);

// Throws c10::Error, on behalf of `what`, when the configuration has nothing to train.
void check_can_train(const FusionConfig& config, const char* what);

// Reads the library's state dict: "<layer>.adapter_fusion_layer.<name>.query.weight". Throws c10::Error for a key that
// is none of it, and for a layer that the model lacks.
AdapterFusion read_fusion(const FusionConfig& config, const StateDict& state, const Structure& structure,
                          const at::TensorOptions& options);

// The inverse: on the CPU, with the names that modules have in adapter_hub_state, which also tells of attention_class.
StateDict fusion_state(const AdapterFusion& fusion, const Structure& structure, const std::string& attention_class);

// The submodule of an `adapters` module that holds a fusion, and where it holds a layer.
std::string fusion_module_name(const std::string& fusion);
std::string fusion_layer_name(int64_t number, const std::string& site);

// Whether the fusion of that name is trainable; not when there is none.
bool is_trainable_fusion(const torch::jit::Module& adapters_module, const std::string& fusion);

std::vector<AdapterFusion> read_fusions(const torch::jit::Module& adapters_module);
void register_fusions(torch::jit::Module& adapters_module, const std::vector<AdapterFusion>& fusions,
                      const std::shared_ptr<torch::jit::CompilationUnit>& unit);

}  // namespace torchgraft
