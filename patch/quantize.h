#pragma once

#include <torchgraft/registration/export.h>

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <string>
#include <vector>

namespace torchgraft {

// What quantize() leaves as it is.
struct QuantizeOptions {
  // Linear maps that stay as they are: roles ("query", "key", "value", "output", "ffn_in", "ffn_gate", "ffn_out", and
  // "other" for maps outside of layers), module paths of maps, or of modules around them.
  std::vector<std::string> skip;
};

// One linear map of the base.
struct LinearMapReport {
  std::string path;  // empty for a constant of a frozen module
  std::vector<std::string> roles;
  int64_t out_features = 0;  // 0: not known
  int64_t in_features = 0;
  std::string kept;  // why it stays in floating point; empty when it is quantised
};

// The result of quantize().
struct Quantized {
  torch::jit::Module module;
  std::vector<LinearMapReport> maps;  // in execution order
};

// Makes int8 of the linear maps of `module`, grafted or not, whose weights are float32: quantized::linear_dynamic, with
// one scale for each row of a weight and one for the activations of a call, as torch.ao.quantization.quantize_dynamic
// with per_channel_dynamic_qconfig makes them. Adapters and heads stay as they are. Packed weights are attributes
// beside the weights that they replace, "encoder.output.dense._packed_params".
//
// The result has forward only, flat and for inference, and only the attributes that it reads. Other parameters share
// the memory of the module's own.
//
// Throws c10::Error when no linear map can be quantised, when `options.skip` names nothing, when a trainable adapter is
// grafted, or when forward does what a copy cannot: assigns attributes, reads objects.
TORCHGRAFT_PATCH_API Quantized quantize(const torch::jit::Module& module, const QuantizeOptions& options = {});

// A module that tells what quantize() costs: forward, with the arguments of the base's, returns a list with, for each
// map that is quantised and stands in no branch, |int8 product - product| / |product| on the base's own activations (a
// number), in the order of `maps`. `maps` lists only these.
TORCHGRAFT_PATCH_API Quantized quantization_probe(const torch::jit::Module& module,
                                                  const QuantizeOptions& options = {});

}  // namespace torchgraft
