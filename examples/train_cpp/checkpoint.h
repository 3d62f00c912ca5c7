#pragma once

#include <torchgraft/plan/safetensors.h>

#include <torch/optim/adamw.h>

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

// Where a run is. Epochs count from 0.
struct Position {
  int64_t epoch = 0;
  int64_t step = 0;  // done in this epoch
  int64_t best_epoch = -1;
  double best_loss = std::numeric_limits<double>::infinity();  // on the validation examples
  bool finished = false;
};

// What must be alike in a run that goes on: options, and digests of files.
using Settings = std::map<std::string, std::string>;

using NamedParameters = std::vector<std::pair<std::string, at::Tensor>>;

// One safetensors file that holds all of a run: settings, position, parameters, AdamW's moments and steps, the best
// epoch's parameters, the default generator. It is replaced whole or not at all, whenever the process is killed.
class CheckpointFile {
 public:
  CheckpointFile(std::string path, Settings settings);

  bool exists() const;

  // Removes what killed processes left half-written beside the file.
  void remove_leftovers() const;

  // `best` is empty, or has a tensor for each parameter. Throws c10::Error when the file cannot be written.
  void write(const Position& position, const NamedParameters& parameters, const torch::optim::AdamW& optimizer,
             const torchgraft::StateDict& best) const;

  // Puts everything back in place. Throws c10::Error, before anything is changed, when the file is damaged or is of a
  // run with other settings.
  Position read(const NamedParameters& parameters, torch::optim::AdamW& optimizer, torchgraft::StateDict& best) const;

 private:
  void check_settings(const torchgraft::StateDict& tensors) const;

  std::string path_;
  Settings settings_;
};

// A short digest of a file's bytes, to tell two files apart. Throws c10::Error when it cannot be read.
std::string file_digest(const std::string& path);
