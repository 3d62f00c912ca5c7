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

// What a run that goes on must share with the run before: options, and digests of files.
using Settings = std::map<std::string, std::string>;

using NamedParameters = std::vector<std::pair<std::string, at::Tensor>>;

// One safetensors file with everything of a run: settings, position, parameters, AdamW's moments and steps, the best
// epoch's parameters, the default generator's state. A process that is killed leaves the old file or the new one.
class CheckpointFile {
 public:
  CheckpointFile(std::string path, Settings settings);

  bool exists() const;

  // Removes the half-written files that killed processes have left beside it.
  void remove_leftovers() const;

  // `best` is empty, or has a tensor for each parameter. Throws c10::Error when it cannot write the file.
  void write(const Position& position, const NamedParameters& parameters, const torch::optim::AdamW& optimizer,
             const torchgraft::StateDict& best) const;

  // Restores everything. Throws c10::Error, and changes nothing, when the file is damaged or is of a run with other
  // settings.
  Position read(const NamedParameters& parameters, torch::optim::AdamW& optimizer, torchgraft::StateDict& best) const;

 private:
  void check_settings(const torchgraft::StateDict& tensors) const;

  std::string path_;
  Settings settings_;
};

// A short digest of a file's bytes, to tell two files apart. Throws c10::Error when it cannot read the file.
std::string file_digest(const std::string& path);
