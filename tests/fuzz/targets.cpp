#include "targets.h"

#include "generate_request.h"
#include "predict_request.h"
#include "structures.h"

#include <torchgraft/config/check_supported.h>
#include <torchgraft/config/composition_string.h>
#include <torchgraft/config/config_json.h>
#include <torchgraft/config/config_string.h>
#include <torchgraft/config/fusion_config.h>
#include <torchgraft/config/head_config.h>
#include <torchgraft/patch/adapters/fusions.h>
#include <torchgraft/plan/plan.h>
#include <torchgraft/plan/read_adapter_hub.h>
#include <torchgraft/plan/safetensors.h>
#include <torchgraft/registration/pickle_tensors.h>

#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <unistd.h>

#include <variant>

namespace torchgraft::fuzz {
namespace {

// A file without a place on a disk.
class MemoryFile {
 public:
  explicit MemoryFile(std::string_view bytes) : descriptor_(memfd_create("fuzz", MFD_CLOEXEC)) {
    TORCH_INTERNAL_ASSERT(write(descriptor_, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { close(descriptor_); }

  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};

// What is before the first line feed, and what is behind it.
std::pair<std::string_view, std::string_view> first_line(std::string_view bytes) {
  const size_t end = bytes.find('\n');
  return end == std::string_view::npos ? std::pair(bytes, std::string_view())
                                       : std::pair(bytes.substr(0, end), bytes.substr(end + 1));
}

// Some adapters need embeddings.
Structure with_embeddings(Structure structure) {
  structure.embedding_size = structure.layers.front().hidden_size;
  return structure;
}

// The elements of a module's weights, as a double, which does not wrap.
double size_of(const PlannedModule& module) {
  struct Size {
    double operator()(const PlannedLoRA& lora) const {
      const double of_task = static_cast<double>(lora.config.n_up_projection) * static_cast<double>(lora.out_features);
      return static_cast<double>(lora.config.r) * (static_cast<double>(lora.in_features + lora.out_features) + of_task);
    }
    double operator()(const PlannedBottleneck& bottleneck) const {
      return static_cast<double>(bottleneck.bottleneck_size) * static_cast<double>(bottleneck.hidden_size);
    }
    double operator()(const PlannedPrefix& prefix) const {
      return (static_cast<double>(prefix.config.prefix_length) + static_cast<double>(prefix.config.bottleneck_size)) *
             static_cast<double>(prefix.hidden_size);
    }
    double operator()(const PlannedInvertible& invertible) const {
      return static_cast<double>(invertible.embedding_size) *
             (static_cast<double>(invertible.f_size) + static_cast<double>(invertible.g_size));
    }
    double operator()(const PlannedReft& reft) const {
      return static_cast<double>(reft.config.r) * static_cast<double>(reft.hidden_size);
    }
    double operator()(const PlannedPrompt& prompt) const {
      return static_cast<double>(prompt.config.prompt_length) * static_cast<double>(prompt.embedding_size);
    }
  };
  return std::visit(Size(), module.method);
}

void read_tensors(std::string_view bytes) { read_safetensors(MemoryFile(bytes).path()); }

void use_config(const AdapterConfig& config) {
  check_supported(config);
  config_from_json(config_to_json(config));
  make_plan(with_embeddings(testing::bert_like(2)), config);
}

void read_config(std::string_view bytes) { use_config(config_from_json(bytes)); }

void read_config_string(std::string_view bytes) { use_config(config_from_string(std::string(bytes))); }

void read_head(std::string_view bytes) {
  if (is_known_head(bytes)) {
    const HeadConfig config = head_config_from_json(bytes);
    check_supported(config);
    head_config_from_json(head_config_to_json(config));
  }
}

void read_sites(std::string_view bytes) {
  const Structure structure = structure_from_json(std::string(bytes));
  structure_from_json(to_json(structure));
  make_plan(structure, config_from_string("mam"));
}

// A line of configuration, then a file of weights.
void read_checkpoint(std::string_view bytes) {
  constexpr double kMostElements = 1e7;
  const auto [text, tensors] = first_line(bytes);
  const AdapterConfig config = config_from_string(std::string(text));
  check_supported(config);
  const StateDict state = read_safetensors(MemoryFile(tensors).path());
  for (const Structure& structure : {with_embeddings(testing::bert_like(2)), testing::bart_like(2)}) {
    const Plan plan = make_plan(structure, config);
    double size = 0;
    for (const PlannedModule& module : plan) {
      size += size_of(module);
    }
    if (size <= kMostElements) {
      adapter_hub_weights(plan, structure, state, "task", at::kFloat);
    }
  }
}

void use_composition(const Composition& composition) {
  composition_from_json(composition_to_json(composition));
  composition_from_string(composition_to_string(composition));
  fusion_names(normalised(composition));
}

void read_composition(std::string_view bytes) { use_composition(composition_from_json(bytes)); }

void read_composition_string(std::string_view bytes) { use_composition(composition_from_string(bytes)); }

// An adapter_fusion_config.json in one line, then a file of weights.
void read_fusion_layers(std::string_view bytes) {
  const auto [text, tensors] = first_line(bytes);
  const FusionConfig config = fusion_config_from_json(text);
  fusion_config_from_json(fusion_config_to_json(config));
  const StateDict state = read_safetensors(MemoryFile(tensors).path());
  read_fusion(config, state, testing::bert_like(2), at::kFloat);
}

void read_generate(std::string_view bytes) {
  try {
    parse_generate(std::string(bytes));
  } catch (const RequestError& error) {
    TORCH_CHECK(error.status != 400, error.what());
    throw;
  }
}

void read_request(std::string_view bytes) {
  try {
    parse_predict(std::string(bytes));
  } catch (const RequestError& error) {
    TORCH_CHECK(error.status != 400, error.what());
    throw;
  }
}

void walk_pickle(std::string_view bytes) {
  check_pickled_tensors(bytes, [](const std::string& key) { return uint64_t{48} * key.size(); });
}

}  // namespace

const std::map<std::string, Target>& targets() {
  static const std::map<std::string, Target> kTargets = {{"checkpoint", read_checkpoint},
                                                         {"composition", read_composition},
                                                         {"composition_string", read_composition_string},
                                                         {"config", read_config},
                                                         {"config_string", read_config_string},
                                                         {"fusion", read_fusion_layers},
                                                         {"generate", read_generate},
                                                         {"head", read_head},
                                                         {"pickle", walk_pickle},
                                                         {"request", read_request},
                                                         {"safetensors", read_tensors},
                                                         {"sites", read_sites}};
  return kTargets;
}

void run(Target target, std::string_view bytes) {
  try {
    target(bytes);
  } catch (const c10::Error&) {
  }
}

}  // namespace torchgraft::fuzz
