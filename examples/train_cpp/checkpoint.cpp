#include "checkpoint.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/util/hash.h>
#include <torchgraft/plan/temporary_file.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace {

using torch::optim::AdamWParamState;
using torchgraft::StateDict;

constexpr const char* kParameters = "parameters/";
constexpr const char* kBest = "best/";
constexpr const char* kFirstMoment = "exp_avg/";
constexpr const char* kSecondMoment = "exp_avg_sq/";
constexpr const char* kSteps = "step/";

at::Tensor bytes_of(const std::string& text) {
  const at::Tensor bytes = at::empty({static_cast<int64_t>(text.size())}, at::kByte);
  std::memcpy(bytes.data_ptr(), text.data(), text.size());
  return bytes;
}

std::string text_of(const at::Tensor& bytes) {
  return {static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes()};
}

std::string lines_of(const Settings& settings) {
  std::string text;
  for (const auto& [key, value] : settings) {
    text += key + "=" + value + "\n";
  }
  return text;
}

Settings settings_of(const std::string& lines) {
  Settings settings;
  std::istringstream stream(lines);
  for (std::string line; std::getline(stream, line);) {
    const size_t end = line.find('=');
    settings[line.substr(0, end)] = end == std::string::npos ? "" : line.substr(end + 1);
  }
  return settings;
}

// The tensor `key`; throws when it is missing or has another dtype or shape. where: the file's path.
const at::Tensor& take(const StateDict& tensors, const std::string& where, const std::string& key, at::ScalarType dtype,
                       at::IntArrayRef shape) {
  const auto found = tensors.find(key);
  TORCH_CHECK(found != tensors.end(), where, ": a damaged checkpoint: no '", key, "'");
  TORCH_CHECK(found->second.scalar_type() == dtype && found->second.sizes() == shape, where,
              ": a damaged checkpoint: '", key, "': expected ", dtype, " ", shape, ", got ",
              found->second.scalar_type(), " ", found->second.sizes());
  return found->second;
}

const at::Tensor& take_like(const StateDict& tensors, const std::string& where, const std::string& key,
                            const at::Tensor& other) {
  return take(tensors, where, key, other.scalar_type(), other.sizes());
}

at::Tensor generator_state() { return at::detail::getDefaultCPUGenerator().get_state(); }

}  // namespace

CheckpointFile::CheckpointFile(std::string path, Settings settings)
    : path_(std::move(path)), settings_(std::move(settings)) {}

bool CheckpointFile::exists() const { return std::filesystem::exists(path_); }

void CheckpointFile::remove_leftovers() const { torchgraft::remove_leftovers(path_); }

void CheckpointFile::write(const Position& position, const NamedParameters& parameters,
                           const torch::optim::AdamW& optimizer, const StateDict& best) const {
  StateDict tensors;
  tensors["settings"] = bytes_of(lines_of(settings_));
  tensors["generator"] = generator_state();
  tensors["position"] = at::tensor({position.epoch, position.step, position.best_epoch, int64_t{position.finished}});
  tensors["best_loss"] = at::full({}, position.best_loss, at::kDouble);
  for (const auto& [name, parameter] : parameters) {
    tensors[kParameters + name] = parameter;
    const auto state = optimizer.state().find(parameter.unsafeGetTensorImpl());
    if (state != optimizer.state().end()) {  // else the parameter has never had a gradient
      const auto& moments = static_cast<const AdamWParamState&>(*state->second);
      tensors[kSteps + name] = at::full({}, moments.step(), at::kLong);
      tensors[kFirstMoment + name] = moments.exp_avg();
      tensors[kSecondMoment + name] = moments.exp_avg_sq();
    }
  }
  for (const auto& [name, tensor] : best) {
    tensors[kBest + name] = tensor;
  }
  torchgraft::write_safetensors(tensors, path_);
}

void CheckpointFile::check_settings(const StateDict& tensors) const {
  const auto found = tensors.find("settings");
  TORCH_CHECK(found != tensors.end(), path_, ": not a checkpoint of this program");
  Settings saved = settings_of(text_of(found->second));
  for (const auto& [key, value] : settings_) {
    TORCH_CHECK(saved[key] == value, path_, ": is of a run with ", key, " ", saved[key], ", now it is ", value,
                "; give the same, another --output, or --restart");
  }
}

Position CheckpointFile::read(const NamedParameters& parameters, torch::optim::AdamW& optimizer,
                              StateDict& best) const {
  const StateDict tensors = torchgraft::read_safetensors(path_, UINT64_MAX);
  check_settings(tensors);
  const at::Tensor generator = take_like(tensors, path_, "generator", generator_state());
  const auto* numbers = take(tensors, path_, "position", at::kLong, {4}).const_data_ptr<int64_t>();
  const Position position{numbers[0], numbers[1], numbers[2],
                          take(tensors, path_, "best_loss", at::kDouble, {}).item<double>(), numbers[3] != 0};
  for (const auto& [name, parameter] : parameters) {  // every check before the first change
    take_like(tensors, path_, kParameters + name, parameter);
    if (position.best_epoch >= 0) {
      take_like(tensors, path_, kBest + name, parameter);
    }
    if (tensors.contains(kSteps + name)) {
      take(tensors, path_, kSteps + name, at::kLong, {});
      take_like(tensors, path_, kFirstMoment + name, parameter);
      take_like(tensors, path_, kSecondMoment + name, parameter);
    }
  }
  const at::NoGradGuard no_gradients;
  for (const auto& [name, parameter] : parameters) {
    at::Tensor(parameter).copy_(tensors.at(kParameters + name));
    if (position.best_epoch >= 0) {
      best[name] = tensors.at(kBest + name);
    }
    if (tensors.contains(kSteps + name)) {
      auto state = std::make_unique<AdamWParamState>();
      state->step(tensors.at(kSteps + name).item<int64_t>());
      state->exp_avg(tensors.at(kFirstMoment + name));
      state->exp_avg_sq(tensors.at(kSecondMoment + name));
      optimizer.state()[parameter.unsafeGetTensorImpl()] = std::move(state);
    }
  }
  at::Generator default_generator = at::detail::getDefaultCPUGenerator();
  default_generator.set_state(generator);
  return position;
}

std::string file_digest(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file.good(), path, ": cannot read");
  std::string block(1 << 20, '\0');
  std::string digest;
  while (file.read(block.data(), static_cast<std::streamsize>(block.size())), file.gcount() > 0) {
    block.resize(static_cast<size_t>(file.gcount()));
    digest = c10::sha1(digest + block).str();  // a chain: sha1() takes all of its text at once
  }
  return digest;
}
