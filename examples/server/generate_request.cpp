#include "generate_request.h"

#include "request_body.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <random>

namespace {

using nlohmann::json;

constexpr int kDeepestBody = 3;                    // body -> input_ids -> id
constexpr int64_t kMostTokens = int64_t{1} << 40;  // sums of such numbers do not overflow
constexpr size_t kMostStops = 64;

[[noreturn]] void refuse(const std::string& key, const std::string& expected, const json& value) {
  throw RequestError(400, "\"" + key + "\": expected " + expected + ", got " + shown_value(value));
}

int64_t read_count(const std::string& key, const json& value) {
  if (!value.is_number_integer() || value < 1 || value > kMostTokens) {
    refuse(key, "an integer from 1 to " + std::to_string(kMostTokens), value);
  }
  return value.get<int64_t>();
}

bool read_bool(const std::string& key, const json& value) {
  if (!value.is_boolean()) {
    refuse(key, "true or false", value);
  }
  return value.get<bool>();
}

double read_temperature(const std::string& key, const json& value) {
  if (!value.is_number() || !(value.get<double>() >= 1e-6 && value.get<double>() <= 1e6)) {
    refuse(key, "a number from 0.000001 to 1000000", value);
  }
  return value.get<double>();
}

double read_probability(const std::string& key, const json& value) {
  if (!value.is_number() || !(value.get<double>() > 0 && value.get<double>() <= 1)) {
    refuse(key, "a number above 0, at most 1", value);
  }
  return value.get<double>();
}

uint64_t read_seed(const std::string& key, const json& value) {
  if (!value.is_number_unsigned()) {
    refuse(key, "an integer from 0 to " + std::to_string(std::numeric_limits<uint64_t>::max()), value);
  }
  return value.get<uint64_t>();
}

std::vector<int64_t> read_stop(const std::string& key, const json& value) {
  std::vector<int64_t> ids = read_ids(value, "\"" + key + "\"");
  if (ids.size() > kMostStops) {
    throw RequestError(400, "\"" + key + "\": expected at most " + std::to_string(kMostStops) + " token ids, got " +
                                std::to_string(ids.size()));
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

using Read = std::function<void(GenerateRequest&, const std::string& key, const json& value)>;

const std::map<std::string, Read>& sampling_fields() {
  static const std::map<std::string, Read> kFields = {
      {"temperature",
       [](auto& to, const auto& key, const json& value) { to.sampling.temperature = read_temperature(key, value); }},
      {"top_k", [](auto& to, const auto& key, const json& value) { to.sampling.top_k = read_count(key, value); }},
      {"top_p", [](auto& to, const auto& key, const json& value) { to.sampling.top_p = read_probability(key, value); }},
      {"seed", [](auto& to, const auto& key, const json& value) { to.sampling.seed = read_seed(key, value); }}};
  return kFields;
}

const std::map<std::string, Read>& fields() {
  static const std::map<std::string, Read> kFields = {
      {"adapter", [](auto& to, const auto&, const json& value) { to.adapter = read_adapter_name(value); }},
      {"input_ids", [](auto& to, const auto&, const json& value) { to.prompt = read_ids(value, "\"input_ids\""); }},
      {"max_new_tokens",
       [](auto& to, const auto& key, const json& value) { to.max_new_tokens = read_count(key, value); }},
      {"stop", [](auto& to, const auto& key, const json& value) { to.stop = read_stop(key, value); }},
      {"do_sample", [](auto& to, const auto& key, const json& value) { to.sampling.greedy = !read_bool(key, value); }},
      {"stream", [](auto& to, const auto& key, const json& value) { to.stream = read_bool(key, value); }}};
  return kFields;
}

}  // namespace

int64_t most_cached_tokens(const GenerateRequest& request) {
  return static_cast<int64_t>(request.prompt.size()) + request.max_new_tokens - 1;
}

GenerateRequest parse_generate(const std::string& text) {
  const json body = parse_body(text, kDeepestBody);
  if (!body.is_object()) {
    throw RequestError(400, R"(expected {"adapter": name or null, "input_ids": [...]}, got )" + shown_value(body));
  }
  GenerateRequest result;
  for (const auto& [key, value] : body.items()) {
    const bool is_field = fields().count(key) > 0;
    if (!is_field && !sampling_fields().count(key)) {
      throw RequestError(400, "unknown field " + shown_value(key));
    }
    (is_field ? fields() : sampling_fields()).at(key)(result, key, value);
  }
  for (const auto& [key, read] : sampling_fields()) {
    if (result.sampling.greedy && body.contains(key)) {
      throw RequestError(400, "\"" + key + "\" has a meaning with \"do_sample\": true only");
    }
  }
  if (!body.contains("seed")) {
    std::random_device source;
    result.sampling.seed = (uint64_t{source()} << 32) | source();
  }
  if (result.prompt.empty()) {
    throw RequestError(
        400, body.contains("input_ids") ? "\"input_ids\": expected at least one token id" : "\"input_ids\" is missing");
  }
  return result;
}
