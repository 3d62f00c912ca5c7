#pragma once

#include "data.h"
#include "options.h"

#include <torchgraft/patch/forward_inputs.h>

#include <torch/csrc/jit/api/module.h>

#include <string>
#include <utility>
#include <vector>

// A grafted encoder whose adapter, with its head, is trained.
class Classifier {
 public:
  // Loads the base, grafts the adapter (or unfreezes the one of that name) and, unless it has a head, gives it one for
  // `labels`. Draws fresh weights from the default generator. Throws c10::Error when it cannot load the model, when
  // forward needs something that a text does not give, or when the adapter's own head has other labels.
  Classifier(const AdapterOptions& options, const std::vector<std::string>& labels);

  // [B, L] of B rows.
  at::Tensor logits(const Examples& rows) const;

  // In training mode the dropout of the adapter acts, and that of the base, if its graph has any.
  void set_training(bool on) { module_.train(on); }

  const std::vector<std::pair<std::string, at::Tensor>>& parameters() const { return parameters_; }

  // Writes the adapter and its head as a directory of the adapters library.
  void save(const std::string& directory, const std::string& model_class) const;

 private:
  torch::jit::Module module_;
  std::string adapter_;
  torchgraft::ForwardInputs inputs_;  // of forward_with_head
  std::vector<std::pair<std::string, at::Tensor>> parameters_;
};
