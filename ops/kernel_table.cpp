#include <c10/util/Exception.h>
#include <torchgraft/ops/kernel_mode.h>
#include <torchgraft/ops/kernel_table.h>
#include <torchgraft/registration/parse_json.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

namespace torchgraft::ops {
namespace {

using Json = nlohmann::json;

template <typename Value>
Value one_of(const Json& entry, const char* key, std::initializer_list<std::pair<const char*, Value>> known) {
  const auto name = entry.at(key).get<std::string>();
  std::string names;
  for (const auto& [known_name, value] : known) {
    if (name == known_name) {
      return value;
    }
    names += (names.empty() ? "" : ", ") + std::string(known_name);
  }
  TORCH_CHECK(false, "expected \"", key, "\" to be one of ", names, ", got \"", name, "\"");
}

// The library takes true for 1.
double number(const Json& entry, const char* key) {
  const Json& value = entry.at(key);
  TORCH_CHECK(!value.is_boolean(), "expected \"", key, "\" to be a number, got ", value.dump());
  return value.get<double>();
}

double positive(const Json& entry, const char* key) {
  const double value = number(entry, key);
  TORCH_CHECK(value > 0.0 && std::isfinite(value), "expected \"", key, "\" to be a positive number, got ", value);
  return value;
}

}  // namespace

KernelTable KernelTable::parse(const std::string& text, const std::string& source) {
  KernelTable table;
  const Json json = parse_json(text, source);
  try {
    const double version = number(json, "kernel_table");
    TORCH_CHECK(version == 1, "expected \"kernel_table\" to be 1, got ", version);
    const bool is_ours = json.at("instruction_set").get<std::string>() == kernel_instruction_set();
    for (const Json& entry : json.at("measurements")) {
      Measurement found{};
      found.op = one_of<FusedOp>(entry, "op",
                                 {{"gated_lora", FusedOp::kLora},
                                  {"gated_lora_linear", FusedOp::kLoraLinear},
                                  {"gated_bottleneck", FusedOp::kBottleneck},
                                  {"gated_bottleneck_linear", FusedOp::kBottleneckLinear},
                                  {"gated_prefix_attention", FusedOp::kPrefixAttention},
                                  {"linear", FusedOp::kLinear}});
      found.type = one_of<at::ScalarType>(entry, "dtype", {{"float32", at::kFloat}, {"bfloat16", at::kBFloat16}});
      found.log_tokens = std::log2(positive(entry, "tokens"));
      found.log_features = std::log2(positive(entry, "features"));
      found.fused_is_faster = positive(entry, "fused") <= positive(entry, "reference");
      if (is_ours) {
        table.measurements_.push_back(found);
      }
    }
  } catch (const Json::exception& error) {
    TORCH_CHECK(false, source, ": expected what torchgraft tune writes, got ", error.what());
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, source, ": ", error.msg());
  }
  return table;
}

std::optional<bool> KernelTable::fused_is_faster(FusedOp op, at::ScalarType type, int64_t tokens,
                                                 int64_t features) const {
  std::optional<bool> result;
  double nearest = std::numeric_limits<double>::infinity();
  if (measurements_.empty()) {
    return result;
  }
  const double log_tokens = std::log2(static_cast<double>(tokens));
  const double log_features = std::log2(static_cast<double>(features));
  for (const Measurement& measured : measurements_) {
    const double distance = std::abs(measured.log_tokens - log_tokens) + std::abs(measured.log_features - log_features);
    if (measured.op == op && measured.type == type && distance < nearest) {
      nearest = distance;
      result = measured.fused_is_faster;
    }
  }
  return result;
}

}  // namespace torchgraft::ops
