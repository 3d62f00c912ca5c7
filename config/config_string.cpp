#include <torchgraft/config/config_string.h>

#include <torchgraft/config/closest_name.h>
#include <torchgraft/config/config_json.h>
#include <torchgraft/config/config_union.h>
#include <torchgraft/config/fields.h>
#include <torchgraft/config/json_fields.h>
#include <torchgraft/config/named_configs.h>
#include <torchgraft/registration/parse_json.h>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cctype>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace torchgraft {
namespace {

using json::OrderedJson;

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front()))) {
    text.remove_prefix(1);
  }
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) {
    text.remove_suffix(1);
  }
  return text;
}

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

// Rewrites `key=value, ...`, whose values are Python literals, as the inside of a JSON object.
class LiteralReader {
 public:
  explicit LiteralReader(std::string_view text) : text_(text) {}

  OrderedJson read() {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '\'' || c == '"') {
        string(c);
      } else if (is_word(c)) {
        word();
      } else {
        json_ += c == '(' ? '[' : c == ')' ? ']' : c;
        ++at_;
      }
    }
    return parse_json<OrderedJson>("{" + json_ + "}",
                                   "config: cannot read the values [" + std::string(text_) +
                                       "], expected e.g. [reduction_factor=8, use_gating=True, non_linearity='gelu', "
                                       "leave_out=[0, 1]]");
  }

 private:
  void string(char quote) {
    const size_t end = text_.find(quote, at_ + 1);
    TORCH_CHECK(end != std::string_view::npos, "config: a quote in [", text_, "] is not closed");
    // What is no UTF-8 becomes U+FFFD, which no name has.
    const OrderedJson value(std::string(text_.substr(at_ + 1, end - at_ - 1)));
    json_ += value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
    at_ = end + 1;
  }

  // A key (before "=", or a number before ":"), True, False, None (or as JSON writes them), a number or, without
  // quotes, a string.
  void word() {
    const size_t begin = at_;
    while (at_ < text_.size() && (is_word(text_[at_]) || text_[at_] == '.' || continues_exponent())) {
      ++at_;
    }
    const std::string word(text_.substr(begin, at_ - begin));
    size_t next = at_;
    while (next < text_.size() && std::isspace(static_cast<unsigned char>(text_[next]))) {
      ++next;
    }
    const char follower = next < text_.size() ? text_[next] : ',';
    if (follower == '=') {
      TORCH_CHECK(keys_.insert(word).second, "config: ", word, " is given twice in [", text_, "]; give it once");
      json_ += OrderedJson(word).dump() + ":";
      at_ = next + 1;
    } else if (follower == ':') {
      json_ += OrderedJson(word).dump();
    } else if (word == "True" || word == "true" || word == "False" || word == "false") {
      json_ += word == "True" || word == "true" ? "true" : "false";
    } else if (word == "None" || word == "null") {
      json_ += "null";
    } else {
      json_ += std::isdigit(static_cast<unsigned char>(word[0])) ? word : OrderedJson(word).dump();
    }
  }

  // The sign in 1e-4.
  bool continues_exponent() const {
    return (text_[at_] == '-' || text_[at_] == '+') && at_ > 1 && (text_[at_ - 1] == 'e' || text_[at_ - 1] == 'E') &&
           std::isdigit(static_cast<unsigned char>(text_[at_ - 2]));
  }

  std::string_view text_;
  size_t at_ = 0;
  std::string json_;
  std::set<std::string> keys_;  // that were read
};

// `method` with the values of `changes` in place of its own.
MethodConfig changed(const MethodConfig& method, const OrderedJson& changes) {
  OrderedJson json = parse_json<OrderedJson>(config_to_json(AdapterConfig{{method}}), "config");
  json.update(changes);
  return config_from_json(json.dump()).methods.front();
}

// The class of `method`, and its fields.
std::pair<const char*, std::vector<std::string>> described(const MethodConfig& method) {
  std::vector<std::string> fields;
  const auto add = [&](const char* field, const auto&) { fields.emplace_back(field); };
  if (const auto* bottleneck = std::get_if<BnConfig>(&method)) {
    visit_bn_fields(*bottleneck, add);
    return {"BnConfig", fields};
  }
  if (const auto* prefix = std::get_if<PrefixTuningConfig>(&method)) {
    visit_prefix_fields(*prefix, add);
    return {"PrefixTuningConfig", fields};
  }
  if (const auto* prompt = std::get_if<PromptTuningConfig>(&method)) {
    visit_prompt_fields(*prompt, add);
    return {"PromptTuningConfig", fields};
  }
  if (const auto* reft = std::get_if<ReftConfig>(&method)) {
    visit_reft_fields(*reft, add);
    return {"ReftConfig", fields};
  }
  const auto& lora = std::get<LoRAConfig>(method);
  lora.mtl_lora ? visit_mtl_lora_fields(lora, add) : visit_lora_fields(lora, add);
  return {lora.mtl_lora ? "MTLLoRAConfig" : "LoRAConfig", fields};
}

// Gives each field of `changes` to those methods of a union that have it.
AdapterConfig changed_union(const AdapterConfig& config, const OrderedJson& changes, std::string_view part) {
  std::vector<OrderedJson> own(config.methods.size(), OrderedJson::object());
  for (const auto& [field, value] : changes.items()) {
    bool is_known = false;
    std::string parts;
    std::vector<std::string> all;
    for (size_t i = 0; i < config.methods.size(); ++i) {
      const auto& [name, fields] = described(config.methods[i]);
      if (std::find(fields.begin(), fields.end(), field) != fields.end()) {
        own[i][field] = value;
        is_known = true;
      }
      parts += std::string("; ") + name + " has: " + c10::Join(", ", fields);
      all.insert(all.end(), fields.begin(), fields.end());
    }
    TORCH_CHECK(is_known, "config: no part of '", part, "' has a field '", field, "'", parts, did_you_mean(field, all));
  }
  AdapterConfig result = config;
  for (size_t i = 0; i < own.size(); ++i) {
    result.methods[i] = changed(config.methods[i], own[i]);
  }
  return result;
}

AdapterConfig parse_part(std::string_view part) {
  part = trimmed(part);
  const size_t bracket = part.find('[');
  AdapterConfig config = config_from_name(trimmed(part.substr(0, bracket)));
  if (bracket == std::string_view::npos) {
    return config;
  }
  TORCH_CHECK(part.back() == ']', "config: '", part, "' has no closing bracket at its end");
  const OrderedJson changes = LiteralReader(part.substr(bracket + 1, part.size() - bracket - 2)).read();
  if (config.methods.size() > 1) {
    return changed_union(config, changes, part.substr(0, bracket));
  }
  config.methods.front() = changed(config.methods.front(), changes);
  return config;
}

}  // namespace

AdapterConfig config_from_string(std::string_view text) {
  std::vector<std::string_view> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find('|', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  if (parts.size() == 1) {
    return parse_part(parts.front());
  }
  std::vector<MethodConfig> methods;
  for (const std::string_view part : parts) {
    AdapterConfig config = parse_part(part);
    TORCH_CHECK(config.methods.size() == 1, "config: '", trimmed(part),
                "' is a union itself; a union inside a union is not possible");
    methods.push_back(std::move(config.methods.front()));
  }
  return config_union(std::move(methods));
}

}  // namespace torchgraft
