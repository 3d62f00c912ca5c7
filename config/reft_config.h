#pragma once

#include <torchgraft/registration/export.h>

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace torchgraft {

// Representation fine-tuning (Wu et al. 2024): a low-rank change of what leaves a layer, at its first and last real
// tokens. Fields and defaults are those of LoReftConfig of adapters==1.3.0; its ReftConfig itself has no defaults for
// the first five.
struct ReftConfig {
  std::variant<std::string, std::vector<int64_t>> layers = std::string("all");  // "all", or the layers' numbers
  int64_t prefix_positions = 3;
  int64_t suffix_positions = 0;
  int64_t r = 1;
  bool orthogonality = true;
  bool tied_weights = false;
  double dropout = 0.05;
  std::optional<std::string> non_linearity;  // none: the identity
  std::optional<std::string> dtype;
  bool output_reft = true;
  std::optional<int64_t> init_weights_seed;
  // No dataclass field in the library, which loses it whenever it writes a configuration: false for DiReFT only.
  // Written to JSON only where it is false.
  bool subtract_projection = true;
};

// Calls visit(name, field) for each field, with its name in the library.
template <typename Config, typename Visitor>
void visit_reft_fields(Config& c, Visitor&& visit) {
  visit("layers", c.layers);
  visit("prefix_positions", c.prefix_positions);
  visit("suffix_positions", c.suffix_positions);
  visit("r", c.r);
  visit("orthogonality", c.orthogonality);
  visit("tied_weights", c.tied_weights);
  visit("dropout", c.dropout);
  visit("non_linearity", c.non_linearity);
  visit("dtype", c.dtype);
  visit("output_reft", c.output_reft);
  visit("init_weights_seed", c.init_weights_seed);
  visit("subtract_projection", c.subtract_projection);
}

// The named constructors of the adapters library: LoReftConfig, NoReftConfig, DiReftConfig.
ReftConfig loreft_config();
ReftConfig noreft_config();  // without orthogonality
ReftConfig direft_config();  // without subtract_projection, too

// The name of its non-linearity in the table of activations/.
std::string reft_non_linearity(const ReftConfig& config);

// Units of parameters: one for all positions, or one for the first and one for the last ones.
int64_t reft_units(const ReftConfig& config);

// Whether it acts on the layer of this number.
bool acts_on(const ReftConfig& config, int64_t layer);

// Throws c10::Error that names a field whose value has no meaning.
void check_reft(const ReftConfig& config);

}  // namespace torchgraft
