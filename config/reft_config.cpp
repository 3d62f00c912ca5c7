#include <torchgraft/config/reft_config.h>

#include <torchgraft/activations/activation.h>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cctype>

namespace torchgraft {
namespace {

const std::vector<std::string> kReftDtypes = {"float32", "float", "float64", "double", "float16", "half", "bfloat16"};

bool is_listed(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

constexpr int64_t kMostPositions = 1'000'000'000;

void check_count(const char* field, int64_t value, int64_t least) {
  TORCH_CHECK(value >= least, "config: expected ReftConfig.", field, " to be at least ", least, ", got ", value);
}

void check_positions(const char* field, int64_t value) {
  check_count(field, value, 0);
  TORCH_CHECK(value <= kMostPositions, "config: expected ReftConfig.", field, " to be at most ", kMostPositions,
              ", got ", value);
}

}  // namespace

ReftConfig loreft_config() { return {}; }

ReftConfig noreft_config() {
  ReftConfig config;
  config.orthogonality = false;
  return config;
}

ReftConfig direft_config() {
  ReftConfig config = noreft_config();
  config.subtract_projection = false;
  return config;
}

std::string reft_non_linearity(const ReftConfig& config) {
  std::string name = config.non_linearity.value_or("linear");
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  return name;
}

int64_t reft_units(const ReftConfig& config) { return config.tied_weights ? 1 : 2; }

bool acts_on(const ReftConfig& config, int64_t layer) {
  const auto* numbers = std::get_if<std::vector<int64_t>>(&config.layers);
  return !numbers || std::find(numbers->begin(), numbers->end(), layer) != numbers->end();
}

void check_reft(const ReftConfig& config) {
  const auto* word = std::get_if<std::string>(&config.layers);
  TORCH_CHECK(!word || *word == "all",
              "config: expected ReftConfig.layers to be \"all\" or a list of layer numbers, got \"", word ? *word : "",
              "\"");
  check_positions("prefix_positions", config.prefix_positions);
  check_positions("suffix_positions", config.suffix_positions);
  check_count("r", config.r, 1);
  TORCH_CHECK(config.output_reft && config.prefix_positions + config.suffix_positions > 0, "config: ReftConfig has ",
              config.output_reft ? "no positions" : "output_reft=False", ": such an adapter would change nothing");
  TORCH_CHECK(config.dropout >= 0.0 && config.dropout < 1.0,
              "config: expected ReftConfig.dropout to be at least 0 and below 1, got ", config.dropout);
  const std::string name = reft_non_linearity(config);
  TORCH_CHECK(is_listed(non_linearity_names(), name), "config: ReftConfig.non_linearity=", name,
              " is not supported yet (supported: ", c10::Join(", ", non_linearity_names()), ", None)");
  TORCH_CHECK(!config.dtype || is_listed(kReftDtypes, *config.dtype),
              "config: ReftConfig.dtype=", config.dtype.value_or(""),
              " is not supported yet (supported: ", c10::Join(", ", kReftDtypes), ")");
}

}  // namespace torchgraft
