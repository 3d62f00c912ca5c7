#pragma once

#include <torchgraft/registration/export.h>

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace torchgraft {

// One entry of list_adapters().
struct AdapterInfo {
  std::string name;
  std::string config;  // JSON, as adapter_config(name) gives it
  bool active = false;
  bool merged = false;       // see merge_adapter
  bool trainable = false;    // see train.h
  std::string gate_pooling;  // "all" or "unpadded" (config/gate_pooling.h); empty without gates
  int64_t parameters = 0;  // trained numbers, the head's too, without the padding of its bank; of a composition, those
                           // of its AdapterFusion layers and its head
  int64_t bytes = 0;       // of these numbers
  std::map<std::string, int64_t>
      by_location;               // parameters by the adapters library's location ("output_adapter"), or "head"
  std::string composition = {};  // "Stack(en, ner)" (compose.h); empty: an adapter
};

// Lists the adapters, and behind them the compositions, in the order of adapter_names(), in which adapter_ids count.
TORCHGRAFT_PATCH_API std::vector<AdapterInfo> list_adapters(const torch::jit::Module& module);

}  // namespace torchgraft
