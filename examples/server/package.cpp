#include "package.h"

#include <torchgraft/config/config_json.h>
#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/patch/base_digest.h>
#include <torchgraft/registration/library.h>
#include <torchgraft/registration/parse_json.h>

#include <ATen/Parallel.h>
#include <torch/version.h>

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

namespace {

constexpr const char* kRemedy = "make it anew: torchgraft export MODEL.pt --pool ROWS --aoti OUT.aoti.pt2";

// "2.13" of "2.13.0+cpu".
std::string minor_version(const std::string& version) {
  return version.substr(0, version.find('.', version.find('.') + 1));
}

void check_versions(const std::string& path, const nlohmann::json& package) {
  const std::string torch = package.at("torch"), library = package.at("torchgraft");
  TORCH_CHECK(minor_version(torch) == minor_version(TORCH_VERSION), path, ": compiled by torch ", torch,
              ", and this server runs with ", TORCH_VERSION, "; ", kRemedy, ", with this torch");
  TORCH_CHECK(library == torchgraft::version(), path, ": compiled with torchgraft ", library, ", and this server has ",
              torchgraft::version(), "; ", kRemedy, ", with this torchgraft");
}

PackageForm::Range range_of(const nlohmann::json& pair) {
  const auto& most = pair.at(1);
  return {pair.at(0), most.is_null() ? std::numeric_limits<int64_t>::max() : most.get<int64_t>()};
}

size_t least_tokens_of(const PackageForm& form) {
  int64_t least = 1;
  for (const PackageForm::Input& input : form.inputs) {
    least = input.sizes.size() == 2 ? std::max(least, input.sizes[1].least) : least;
  }
  return static_cast<size_t>(least);
}

bool pads(const PackageForm& form) {
  return std::all_of(form.room.begin(), form.room.end(), [](const torchgraft::AdapterConfig& config) {
    return !torchgraft::has_gates(config) || torchgraft::pools_unpadded(config);
  });
}

// The banks of `module` by the names that a package has for them.
Banks banks_of(const torch::jit::Module& module) {
  Banks banks;
  const auto add = [&](const std::string& name, const at::Tensor& tensor) {
    if (name.starts_with(kBanks)) {
      banks[name] = tensor;
    }
  };
  for (const auto& parameter : module.named_parameters()) {
    add(parameter.name, parameter.value);
  }
  for (const auto& buffer : module.named_buffers()) {
    add(buffer.name, buffer.value);
  }
  return banks;
}

}  // namespace

PackageForm read_package_form(const std::string& path) {
  const nlohmann::json description = package_description(path, kRemedy);
  try {
    TORCH_CHECK(description.contains("pool") && description.contains("package"), path,
                ": its adapters are fixed, so that no pool can bring others in; ", kRemedy);
    check_versions(path, description.at("package"));
    PackageForm form;
    form.capacity = description.at("pool").at("capacity");
    form.base = description.at("pool").at("base");
    for (const auto& config : description.at("pool").at("room")) {
      form.room.push_back(torchgraft::config_from_json(config.dump()));
    }
    form.banks = description.at("package").at("banks");
    for (const auto& input : description.at("package").at("inputs")) {
      PackageForm::Input& read = form.inputs.emplace_back(PackageForm::Input{input.at("name"), {}});
      for (const auto& size : input.at("sizes")) {
        read.sizes.push_back(range_of(size));
      }
    }
    return form;
  } catch (const nlohmann::json::exception& error) {
    TORCH_CHECK(false, path, ": a damaged description (", torchgraft::json_fault(error.what()), "); ", kRemedy);
  }
}

void check_sizes(const PackageForm& form, size_t rows, size_t tokens) {
  for (const PackageForm::Input& input : form.inputs) {
    const bool is_ids = &input == &form.inputs.back();
    TORCH_CHECK(input.sizes.size() == (is_ids ? 1 : 2), "the package takes ", input.name, " with ", input.sizes.size(),
                " dimensions, expected ", is_ids ? "adapter_ids [rows]" : "[rows, tokens]", "; ", kRemedy,
                ", of a text encoder");
    const auto check = [&](size_t dimension, size_t most, const char* what, const char* option) {
      const PackageForm::Range& range = input.sizes.at(dimension);
      TORCH_CHECK(range.least <= 2 && (range.most > 2 || most <= 2), "the package takes ", input.name, " of ",
                  range.most, " ", what, " only; ", kRemedy, ", without --static");
      TORCH_CHECK(range.most >= static_cast<int64_t>(most), "the package takes at most ", range.most, " ", what,
                  ", and the server's limit is ", most, "; give ", option, " ", range.most);
    };
    check(0, rows, "rows", "--max-batch");
    if (!is_ids) {
      check(1, tokens, "tokens", "--max-tokens");
    }
  }
}

Package::Package(const std::string& path, PackageForm form, size_t passes)
    : path_(path),
      form_(std::move(form)),
      least_tokens_(least_tokens_of(form_)),
      pads_rows_(pads(form_)),
      loader_(path, "model", /*run_single_threaded=*/false, passes) {}

// What the package's code reads of `held` is there, as a tensor that can be written, and an adapter can be nowhere
// else: at a location that the package has no code for it would do nothing.
void Package::check_slots(const Banks& held, const std::vector<std::string>& constants) const {
  const auto slot_of = [](const std::string& bank) { return bank.substr(0, bank.rfind('.')); };
  const std::set<const void*> written = memory_of(constants, held), read = memory_of(form_.banks, held);
  std::set<std::string> slots;
  for (const std::string& name : form_.banks) {
    const auto bank = held.find(name);
    TORCH_CHECK(bank != held.end(), path_, ": reads the bank ", name,
                ", which the model's pool does not have: it was made of another model; ", kRemedy);
    TORCH_CHECK(written.contains(bank->second.data_ptr()), path_, ": has the numbers of the bank ", name,
                " written into its code; ", kRemedy);
    slots.insert(slot_of(name));
  }
  for (const auto& [name, bank] : held) {
    TORCH_CHECK(slots.contains(slot_of(name)) || read.contains(bank.data_ptr()), path_, ": knows nothing of ",
                slot_of(name), ", where the model has adapters: it was made of another model; ", kRemedy);
  }
}

void Package::read_banks_of(const torch::jit::Module& module) {
  TORCH_CHECK(torchgraft::base_digest(module) == form_.base, path_,
              ": the base's weights are not those that it was made of: it is of another model, or of another version; ",
              kRemedy);
  const Banks held = banks_of(module);
  std::vector<std::string> constants = loader_.get_constant_fqns();
  std::erase_if(constants, [](const std::string& name) { return !name.starts_with(kBanks); });
  check_slots(held, constants);
  const auto packed = loader_.get_runner()->extract_constants_map(/*use_inactive=*/false);
  for (const std::string& name : constants) {
    const auto bank = held.find(name);
    TORCH_CHECK(bank != held.end(), path_, ": has the bank ", name,
                ", which the model's pool does not have: it was made of another model; ", kRemedy);
    // load_constants checks no sizes.
    const auto constant = packed.find(name);
    const std::string size = constant == packed.end() ? "of unknown size" : size_text(constant->second);
    TORCH_CHECK(size == size_text(bank->second), path_, ": the bank ", name, " is ", size, " in the package, and ",
                size_text(bank->second), " in the model's pool: it was made of another model; ", kRemedy);
    TORCH_INTERNAL_ASSERT(bank->second.is_contiguous(), name, ": a pool makes contiguous banks");
    banks_[name] = bank->second;
  }
  // The package reads these tensors from now on. Not update_constant_buffer: it knows other names.
  loader_.load_constants(banks_, /*use_inactive=*/false, /*check_full_update=*/false, /*user_managed=*/true);
}

at::Tensor Package::run(const std::vector<c10::IValue>& arguments, const at::Tensor& adapter_ids) {
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& argument : arguments) {
    if (argument.isTensor()) {
      inputs.push_back(argument.toTensor());
    }
  }
  inputs.push_back(adapter_ids);
  TORCH_CHECK(inputs.size() == form_.inputs.size(), path_, ": takes ", form_.inputs.size(),
              " inputs, and a text gives ", inputs.size(),
              "; make it without --example, or with all arguments that a text gives");
  at::get_num_threads();  // gives this thread the number of threads that the compiled loops use
  return loader_.run(inputs).at(0);
}
