#include "package.h"

#include <torchgraft/config/config_json.h>
#include <torchgraft/config/gate_pooling.h>
#include <torchgraft/patch/base_digest.h>
#include <torchgraft/registration/library.h>
#include <torchgraft/registration/parse_json.h>

#include <ATen/Parallel.h>
#include <c10/util/StringUtil.h>
#include <torch/version.h>

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

namespace {

constexpr const char* kBanks = "adapters.";
constexpr const char* kRemedy = "make it anew: torchgraft export MODEL.pt --pool ROWS --aoti OUT.aoti.pt2";

// What `torchgraft export` has written into the package.
nlohmann::json description_in(const std::string& path) {
  std::unordered_map<std::string, std::string> metadata;
  try {
    metadata = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path, "model");
  } catch (const std::exception& error) {
    TORCH_CHECK(false, path, ": not an AOTInductor package, or a damaged one (",
                std::string(error.what()).substr(0, std::string(error.what()).find('\n')), ")");
  }
  const auto found = metadata.find("torchgraft");
  TORCH_CHECK(found != metadata.end(), path, ": a package that torchgraft has not made; ", kRemedy);
  return torchgraft::parse_json(found->second, path);
}

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

std::string size_text(const at::Tensor& tensor) { return c10::str(tensor.scalar_type(), " ", tensor.sizes()); }

// The banks of `module` by the names that a package has for them.
std::unordered_map<std::string, at::Tensor> banks_of(const torch::jit::Module& module) {
  std::unordered_map<std::string, at::Tensor> banks;
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
  const nlohmann::json description = description_in(path);
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
                " dimensions, expected ", is_ids ? "adapter_ids [rows]" : "[rows, tokens]");
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

// An adapter at a location that the package has no code for would do nothing there.
void Package::check_slots(const std::unordered_map<std::string, at::Tensor>& held) const {
  const auto slot_of = [](const std::string& bank) { return bank.substr(0, bank.rfind('.')); };
  std::set<std::string> read;
  std::set<const void*> memory;  // layers may share their banks, of which the package has one name
  for (const std::string& name : form_.banks) {
    read.insert(slot_of(name));
    memory.insert(held.at(name).data_ptr());
  }
  for (const auto& [name, bank] : held) {
    const bool is_read = read.count(slot_of(name)) > 0 || memory.count(bank.data_ptr()) > 0;
    TORCH_CHECK(is_read, path_, ": knows nothing of ", slot_of(name), ", where the model has adapters: it was made of ",
                "another model; ", kRemedy);
  }
}

void Package::read_banks_of(const torch::jit::Module& module) {
  TORCH_CHECK(torchgraft::base_digest(module) == form_.base, path_,
              ": the base's weights are not those that it was made of: it is of another model, or of another version; ",
              kRemedy);
  const auto held = banks_of(module);
  const std::vector<std::string> names = loader_.get_constant_fqns();
  for (const std::string& name : form_.banks) {
    const bool is_there = std::find(names.begin(), names.end(), name) != names.end();
    const auto bank = held.find(name);
    TORCH_CHECK(bank != held.end(), path_, ": reads the bank ", name,
                ", which the model's pool does not have: it was made ", "of another model; ", kRemedy);
    TORCH_CHECK(bank->second.is_contiguous(), name, ": expected a contiguous bank");
    // Layers that share one tensor, of which the package has one name.
    const bool is_shared = std::any_of(names.begin(), names.end(), [&](const std::string& other) {
      const auto found = held.find(other);
      return found != held.end() && found->second.data_ptr() == bank->second.data_ptr();
    });
    TORCH_CHECK(is_there || is_shared, path_, ": has the numbers of the bank ", name, " written into its code; ",
                kRemedy);
  }
  check_slots(held);
  const auto old = loader_.get_runner()->extract_constants_map(/*use_inactive=*/false);
  for (const std::string& name : names) {
    if (!name.starts_with(kBanks)) {
      continue;
    }
    const auto bank = held.find(name);
    const auto constant = old.find(name);
    TORCH_CHECK(bank != held.end(), path_, ": has the bank ", name,
                ", which the model's pool does not have: it was made of ", "another model; ", kRemedy);
    TORCH_CHECK(constant == old.end() || size_text(constant->second) == size_text(bank->second), path_, ": the bank ",
                name, " is ", constant == old.end() ? "" : size_text(constant->second), " in the package, and ",
                size_text(bank->second), " in the model's pool: it was made of another model; ", kRemedy);
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
