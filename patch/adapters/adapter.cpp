#include <torchgraft/patch/adapters/adapter.h>

#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/plan/lora_factors.h>

#include <c10/util/Exception.h>

#include <cctype>
#include <variant>

namespace torchgraft {

bool has_factors(const PlannedModule& planned) {
  return std::holds_alternative<PlannedLoRA>(planned.method) && lora_factors(planned) != LoRAFactors::kNone;
}

GatePoolings gate_poolings(const std::vector<Adapter>& adapters) {
  GatePoolings result;
  for (const Adapter& adapter : adapters) {
    (pools_unpadded(adapter.config) ? result.unpadded : result.all) = true;
  }
  return result;
}

std::string attribute_text(const std::string& name) {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < name.size(); ++i) {
    const auto byte = static_cast<unsigned char>(name[i]);
    const bool begins_an_escape = byte == '_' && i + 1 < name.size() && name[i + 1] == 'x';
    const bool stays = byte < 0x80 && (std::isalnum(byte) || (byte == '_' && !begins_an_escape));
    text += stays ? std::string(1, name[i]) : std::string("_x") + kDigits[byte >> 4] + kDigits[byte & 15];
  }
  return text;
}

std::vector<std::string> names_of(const std::vector<Adapter>& adapters) {
  std::vector<std::string> names;
  for (const Adapter& adapter : adapters) {
    names.push_back(adapter.name);
  }
  return names;
}

size_t find_adapter(const std::vector<Adapter>& adapters, const std::string& name, const char* what) {
  std::string names;
  for (size_t i = 0; i < adapters.size(); ++i) {
    if (adapters[i].name == name) {
      return i;
    }
    names += (i == 0 ? "" : ", ") + adapters[i].name;
  }
  TORCH_CHECK(false, what, ": no adapter is called '", name, "'; there are: ", names);
}

}  // namespace torchgraft
