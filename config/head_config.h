#pragma once

#include <torchgraft/registration/export.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

namespace torchgraft {

// The task head of an adapter: it reads the last hidden states [B, S, H] of the rows that use the adapter. Fields and
// defaults are those of the adapters library's heads, but for `pooling` (the library's is that of the model):
//   x = pooling(hidden); (layers - 1) times: x = activation(Linear[H, H](dropout(x))); logits = Linear[num_labels,
//   H](dropout(x))
struct HeadConfig {
  // "classification", "multilabel_classification" or "tagging" (one result per token: no pooling). A regression is a
  // classification with num_labels=1, as in the library.
  std::string head_type = "classification";
  int64_t num_labels = 2;
  int64_t layers = 2;
  std::optional<std::string> activation_function = "tanh";
  std::optional<std::map<std::string, int64_t>> label2id;
  bool use_pooler = false;
  bool bias = true;
  std::optional<double> dropout_prob;  // none: 0
  // "first" token, "mean" over real tokens, or "last" real token; the token mask says which are real.
  std::string pooling = "first";
};

// The text of a head_config.json: {"config": {...}, "pooling": ...}. Without "pooling" it is the library's for the
// "model_type" there: "last" for GPT-2, GPT-J, LLaMA and Mistral, else "first". Throws c10::Error that names the field.
TORCHGRAFT_PATCH_API HeadConfig head_config_from_json(std::string_view json);
TORCHGRAFT_PATCH_API std::string head_config_to_json(const HeadConfig& config);

// Whether a head_config.json has one of the head types above, and its head reads tokens that are known: not those of
// the model's pooler (use_pooler), nor of a "model_type" whose heads read others (BART, T5: that of the end; BEiT:
// all). Heads for other tasks have other fields. Throws c10::Error where the text is no JSON object.
TORCHGRAFT_PATCH_API bool is_known_head(std::string_view json);

// Throws c10::Error naming the first field whose value is not supported.
TORCHGRAFT_PATCH_API void check_supported(const HeadConfig& config);

}  // namespace torchgraft
