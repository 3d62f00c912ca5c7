#include <torchgraft/plan/saved_paths.h>

#include <torchgraft/plan/checkpoint.h>

#include <algorithm>

namespace torchgraft {

std::optional<size_t> number_position(const SavedPath& path) {
  const auto found = std::find_if(path.begin(), path.end(), is_number);
  return found == path.end() ? std::nullopt : std::optional<size_t>(found - path.begin());
}

bool mentions(const SavedPath& path, const std::string& word) {
  return std::any_of(path.begin(), path.end(),
                     [&](const std::string& part) { return part.find(word) != std::string::npos; });
}

bool is_cross_attention(const SavedPath& path) {
  return mentions(path, "cross") || mentions(path, "encoder_attn") || mentions(path, "EncDecAttention");
}

namespace {

bool is_one_of(const std::string& value, std::initializer_list<const char*> names) {
  return std::find(names.begin(), names.end(), value) != names.end();
}

// Of what stands behind the layer's number.
bool is_in_attention(const SavedPath& path) {
  const SavedPath within(path.begin() + number_position(path).value_or(0), path.end());
  return mentions(within, "attention") || mentions(within, "Attention") || mentions(within, "attn");
}

// Of a linear map outside of attentions.
std::vector<std::string> feed_forward_sites(const SavedPath& path) {
  const std::string& leaf = path.back();
  if (is_one_of(leaf, {"gate", "gate_proj", "wi_0"})) {
    return {"gate_lora"};
  }
  if (mentions(path, "intermediate") ||
      is_one_of(leaf, {"fc1", "fc_in", "lin1", "linear1", "wi", "wi_1", "up_proj", "c_fc", "ffn"})) {
    return {"intermediate_lora"};
  }
  const bool is_mlp_output = leaf == "c_proj" && mentions(path, "mlp");
  if (mentions(path, "output") || is_mlp_output ||
      is_one_of(leaf, {"fc2", "fc_out", "lin2", "linear2", "wo", "down_proj", "ffn_output"})) {
    return {"output_lora"};
  }
  return {};
}

}  // namespace

bool is_unclear_beside_gate(const SavedPath& path) {
  return !is_in_attention(path) && is_one_of(path.back(), {"fc1", "fc2", "fc_in", "fc_out", "lin1", "lin2", "linear1",
                                                           "linear2", "wi", "c_fc", "ffn"});
}

std::vector<std::string> lora_sites(const SavedPath& path) {
  const std::string& leaf = path.back();
  const std::string prefix = is_cross_attention(path) ? "crossattn_lora_" : "selfattn_lora_";
  if (is_one_of(leaf, {"o_proj", "out_proj", "out_lin", "o"}) ||
      (is_in_attention(path) && is_one_of(leaf, {"dense", "c_proj", "wo", "output_proj"}))) {
    return {prefix + "o"};
  }
  if (is_one_of(leaf, {"query", "query_proj", "q_proj", "q_lin", "q", "wq"})) {
    return {prefix + "q"};
  }
  if (is_one_of(leaf, {"key", "key_proj", "k_proj", "k_lin", "k", "wk"})) {
    return {prefix + "k"};
  }
  if (is_one_of(leaf, {"value", "value_proj", "v_proj", "v_lin", "v", "wv"})) {
    return {prefix + "v"};
  }
  if (is_one_of(leaf, {"c_attn", "in_proj", "query_key_value", "qkv", "qkv_proj"})) {
    return {prefix + "q", prefix + "k", prefix + "v"};
  }
  return is_in_attention(path) ? std::vector<std::string>() : feed_forward_sites(path);
}

}  // namespace torchgraft
