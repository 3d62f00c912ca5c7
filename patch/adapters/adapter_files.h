#pragma once

#include <cstdint>

namespace torchgraft {

// The files of an adapter's directory. Those with pickled weights are for Python.
constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kWeightsFile = "adapter.safetensors";
constexpr const char* kPickledWeightsFile = "pytorch_adapter.bin";
constexpr const char* kHeadConfigFile = "head_config.json";
constexpr const char* kHeadWeightsFile = "model_head.safetensors";
constexpr const char* kPickledHeadFile = "pytorch_model_head.bin";

// What a composition's directory has beside directories of its adapters.
constexpr const char* kSetupFile = "adapter_setup.json";

constexpr uint64_t kLongestConfig = 1 << 20;  // bytes of a configuration

}  // namespace torchgraft
