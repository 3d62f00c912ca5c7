#include "trainer.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/nn/utils/clip_grad.h>

#include <cmath>
#include <cstdio>

namespace {

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::vector<at::Tensor> tensors_of(const NamedParameters& parameters) {
  std::vector<at::Tensor> tensors;
  for (const auto& [name, tensor] : parameters) {
    tensors.push_back(tensor);
  }
  return tensors;
}

// [n] int64: the same in every process.
at::Tensor epoch_order(int64_t n, uint64_t seed, int64_t epoch) {
  const uint64_t mixed = seed * 1000003 + static_cast<uint64_t>(epoch) + 1;
  return at::randperm(n, at::make_generator<at::CPUGeneratorImpl>(mixed), at::TensorOptions(at::kLong));
}

}  // namespace

double learning_rate_factor(int64_t done, int64_t warmup_steps, int64_t total_steps) {
  if (done < warmup_steps) {
    return static_cast<double>(done + 1) / static_cast<double>(warmup_steps);
  }
  const auto falling = static_cast<double>(std::max<int64_t>(1, total_steps - warmup_steps));
  return std::max(0.0, 1.0 - static_cast<double>(done - warmup_steps) / falling);
}

Trainer::Trainer(Classifier& classifier, const Examples& training, const std::optional<Examples>& validation,
                 const TrainingOptions& options, const CheckpointFile& checkpoint)
    : classifier_(classifier),
      training_(training),
      validation_(validation),
      options_(options),
      checkpoint_(checkpoint),
      epoch_steps_(quotient_up(training.size(), options.batch_size * options.accumulate)),
      total_steps_(options.epochs * epoch_steps_),
      parameters_(tensors_of(classifier.parameters())),
      optimizer_(parameters_, torch::optim::AdamWOptions(options.learning_rate).weight_decay(options.weight_decay)) {}

void Trainer::run(bool restart) {
  // After a few passes TorchScript's optimising executor runs a graph in another way. A process that goes on begins to
  // count anew, so its results would differ in the last bits.
  const torch::jit::GraphOptimizerEnabledGuard plain_interpreter(false);
  if (checkpoint_.exists() && !restart) {
    position_ = checkpoint_.read(classifier_.parameters(), optimizer_, best_);
    checkpoint_.remove_leftovers();
  } else {
    checkpoint_.remove_leftovers();
    save();  // a full disk shows now, not after the first epoch
  }
  Progress progress(steps_done(), total_steps_);
  if (steps_done() > 0 && !position_.finished) {
    progress.note("going on " + where(position_.step + 1));
  }
  while (!position_.finished) {
    train_epoch(progress);
    end_epoch(progress);
    save();
  }
  const at::NoGradGuard no_gradients;
  for (const auto& [name, parameter] : classifier_.parameters()) {
    if (!best_.empty()) {
      at::Tensor(parameter).copy_(best_.at(name));
    }
  }
}

void Trainer::train_epoch(Progress& progress) {
  classifier_.set_training(true);
  const at::Tensor order = epoch_order(training_.size(), options_.seed, position_.epoch);
  const std::vector<at::Tensor> steps = order.split(options_.batch_size * options_.accumulate);
  epoch_loss_ = 0.0;
  for (int64_t here = 1; position_.step < epoch_steps_; ++here) {
    const at::Tensor& indices = steps[static_cast<size_t>(position_.step)];
    epoch_loss_ += (step(indices) - epoch_loss_) / static_cast<double>(here);
    position_.step += 1;
    progress.update(steps_done(), position_.epoch + 1, epoch_loss_);
    const bool ended = position_.step == epoch_steps_;
    if (ended || steps_done() % options_.checkpoint_every == 0) {
      check_loss(score(training_.rows(indices)).loss, "its own examples");
      classifier_.set_training(true);
      if (!ended) {
        save();
      }
    }
  }
}

// Makes one step on the rows `indices`; returns their mean loss. Each batch of them adds its share to the gradients,
// which so are those of one large batch.
double Trainer::step(const at::Tensor& indices) {
  optimizer_.zero_grad();
  double loss = 0.0;
  for (const at::Tensor& batch : indices.split(options_.batch_size)) {
    const Examples rows = training_.rows(batch);
    const at::Tensor summed = at::cross_entropy_loss(classifier_.logits(rows), rows.labels, {}, at::Reduction::Sum);
    const at::Tensor share = summed / static_cast<double>(indices.size(0));
    loss += share.item<double>();
    TORCH_CHECK(std::isfinite(loss), where(position_.step + 1), ": the loss is ", loss,
                "; try a lower --learning-rate. The last checkpoint is from before this step");
    share.backward();
  }
  const double largest = options_.clip > 0 ? options_.clip : std::numeric_limits<double>::infinity();
  const double norm = torch::nn::utils::clip_grad_norm_(parameters_, largest);
  TORCH_CHECK(std::isfinite(norm), where(position_.step + 1), ": the norm of the gradients is ", norm,
              "; try a lower --learning-rate. The last checkpoint is from before this step");
  const int64_t warmup_steps = std::llround(options_.warmup * static_cast<double>(total_steps_));
  const double factor = learning_rate_factor(steps_done(), warmup_steps, total_steps_);
  optimizer_.param_groups()[0].options().set_lr(options_.learning_rate * factor);
  optimizer_.step();
  return loss;
}

// Only the next forward pass shows that a step was too large. No checkpoint may hold its weights.
void Trainer::check_loss(double loss, const char* examples) const {
  TORCH_CHECK(std::isfinite(loss), where(position_.step), ": after the step the loss on ", examples, " is ", loss,
              "; try a lower --learning-rate. The last checkpoint is from before this step");
}

void Trainer::end_epoch(Progress& progress) {
  char text[160];
  std::snprintf(text, sizeof(text), "epoch %lld/%lld  loss %.4f", static_cast<long long>(position_.epoch + 1),
                static_cast<long long>(options_.epochs), epoch_loss_);
  std::string report = text;
  if (validation_) {
    const Scores scores = score(*validation_);
    check_loss(scores.loss, "the validation examples");
    std::snprintf(text, sizeof(text), "  validation loss %.4f  accuracy %.3f", scores.loss, scores.accuracy);
    report += text;
    if (scores.loss < position_.best_loss) {
      position_.best_loss = scores.loss;
      position_.best_epoch = position_.epoch;
      for (const auto& [name, parameter] : classifier_.parameters()) {
        best_[name] = parameter.detach().clone();
      }
      report += "  (best so far)";
    }
  }
  progress.note(report);
  const bool waited = options_.patience > 0 && position_.epoch - position_.best_epoch >= options_.patience;
  position_.epoch += 1;
  position_.step = 0;
  position_.finished = waited || position_.epoch == options_.epochs;
  if (waited && position_.epoch < options_.epochs) {
    progress.note("stopped early: no better since epoch " + std::to_string(position_.best_epoch + 1));
  }
}

Scores Trainer::score(const Examples& examples) {
  const at::NoGradGuard no_gradients;
  classifier_.set_training(false);
  Scores scores;
  double right = 0.0;
  for (const at::Tensor& batch : at::arange(examples.size()).split(options_.batch_size)) {
    const Examples rows = examples.rows(batch);
    const at::Tensor logits = classifier_.logits(rows);
    scores.loss += at::cross_entropy_loss(logits, rows.labels, {}, at::Reduction::Sum).item<double>();
    right += logits.argmax(1).eq(rows.labels).sum().item<double>();
  }
  const auto count = static_cast<double>(examples.size());
  return {scores.loss / count, right / count};
}

void Trainer::save() const { checkpoint_.write(position_, classifier_.parameters(), optimizer_, best_); }

std::string Trainer::where(int64_t step) const {
  return "in epoch " + std::to_string(position_.epoch + 1) + ", step " + std::to_string(step) + " of " +
         std::to_string(epoch_steps_);
}
