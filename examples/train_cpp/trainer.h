#pragma once

#include "checkpoint.h"
#include "classifier.h"
#include "data.h"
#include "options.h"
#include "progress.h"

#include <torch/optim/adamw.h>

#include <optional>

struct Scores {
  double loss = 0.0;  // mean cross entropy
  double accuracy = 0.0;
};

// The factor of the learning rate in the step after `done` steps: it rises linearly over the warm-up, reaches 1 in its
// last step, and then falls linearly to 0 at the end.
double learning_rate_factor(int64_t done, int64_t warmup_steps, int64_t total_steps);

// One run: AdamW on the weights of the adapter and its head, with the mean cross entropy. With the same arguments it
// ends with the same weights, however often it is killed: the order of an epoch's examples follows from the seed and
// the epoch's number, and everything else is in the checkpoint.
class Trainer {
 public:
  Trainer(Classifier& classifier, const Examples& training, const std::optional<Examples>& validation,
          const TrainingOptions& options, const CheckpointFile& checkpoint);

  // Trains to the end, from the checkpoint, or from the start if there is none or with `restart`. The classifier then
  // has the best epoch's weights, without validation examples the last epoch's. Throws c10::Error when the loss before
  // or after a step, or a gradient, is not finite, or when it cannot write a checkpoint; then the last checkpoint is
  // whole, and from before that step.
  void run(bool restart);

  Scores score(const Examples& examples);

 private:
  void train_epoch(Progress& progress);
  double step(const at::Tensor& indices);
  void check_loss(double loss, const char* examples) const;
  void end_epoch(Progress& progress);
  void save() const;
  int64_t steps_done() const { return position_.epoch * epoch_steps_ + position_.step; }
  std::string where(int64_t step) const;

  Classifier& classifier_;
  const Examples& training_;
  const std::optional<Examples>& validation_;
  const TrainingOptions options_;
  const CheckpointFile& checkpoint_;
  const int64_t epoch_steps_;
  const int64_t total_steps_;
  std::vector<at::Tensor> parameters_;
  torch::optim::AdamW optimizer_;
  torchgraft::StateDict best_;
  Position position_;
  double epoch_loss_ = 0.0;  // mean over the steps that this process has done in the epoch
};
