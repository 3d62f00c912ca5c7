#include "options.h"

#include "../number_option.h"

#include <set>

namespace {

void declare_data(CLI::App& app, DataOptions& data) {
  app.add_option("EXAMPLES.safetensors", data.training, "input_ids, attention_mask [n, S], labels [n]; see tokenise.py")
      ->required();
  app.add_option("--labels", data.labels, "the classes' names, in the order of their numbers: bad,good")
      ->delimiter(',')
      ->required();
  auto* file = app.add_option("--validation", data.validation, "a file like EXAMPLES that decides which epoch to keep");
  add_number(app, "--validation-fraction", data.validation_fraction,
             "instead of a file: this share of EXAMPLES, drawn by --seed", 0.0, 0.9)
      ->excludes(file);
}

void declare_adapter(CLI::App& app, Options& options) {
  AdapterOptions& adapter = options.adapter;
  app.add_option("--adapter", adapter.name, "its name; if MODEL.pt has it already, it is trained further")
      ->capture_default_str();
  app.add_option("--config", adapter.config, "of a new adapter: unipelt, mam, lora[r=16], ...")->capture_default_str();
  app.add_option("--gate-pooling", adapter.gate_pooling, "over which tokens a new adapter's gates are means (all)")
      ->check(CLI::IsMember({"all", "unpadded"}))
      ->capture_default_str();
  app.add_option("--pooling", adapter.pooling, "what the head sees; the adapters library knows \"first\" only")
      ->check(CLI::IsMember({"first", "mean", "last"}))
      ->capture_default_str();
  add_number(app, "--head-layers", adapter.head_layers, "", 1)->capture_default_str();
  add_number(app, "--head-dropout", adapter.head_dropout, "", 0, 0.99)->capture_default_str();
  app.add_option("--model-class", options.model_class, "the class of the adapters library that will load the result")
      ->capture_default_str();
}

void declare_training(CLI::App& app, TrainingOptions& training) {
  add_number(app, "--epochs", training.epochs, "", 1)->capture_default_str();
  add_number(app, "--batch-size", training.batch_size, "", 1)->capture_default_str();
  add_number(app, "--accumulate", training.accumulate, "batches that make one step", 1)->capture_default_str();
  add_number(app, "--learning-rate", training.learning_rate, "at the end of the warm-up; it then falls to 0", 0)
      ->capture_default_str();
  add_number(app, "--weight-decay", training.weight_decay, "", 0)->capture_default_str();
  add_number(app, "--warmup", training.warmup, "share of all steps in which the rate rises", 0.0, 1.0)
      ->capture_default_str();
  add_number(app, "--clip", training.clip, "largest norm of all gradients; 0: any", 0)->capture_default_str();
  add_number(app, "--patience", training.patience,
             "stop after so many epochs without a lower validation loss; 0: never", 0)
      ->capture_default_str();
  add_number(app, "--seed", training.seed, "")->capture_default_str();
  add_number(app, "--checkpoint-every", training.checkpoint_every, "steps; one is also written after each epoch", 1)
      ->capture_default_str();
}

}  // namespace

void declare(CLI::App& app, Options& options) {
  app.add_option("MODEL.pt", options.adapter.base, "a TorchScript text encoder, grafted or not")->required();
  declare_data(app, options.data);
  app.add_option("-o,--output", options.output, "folder for adapter/ and checkpoint.safetensors")->required();
  declare_adapter(app, options);
  declare_training(app, options.training);
  app.add_flag("--restart", options.restart, "start anew where --output has a checkpoint, instead of going on");
  add_number(app, "--threads", options.threads, "threads for each operator (libtorch's default)", 1);
}

void check(const Options& options) {
  const DataOptions& data = options.data;
  const std::set<std::string> different(data.labels.begin(), data.labels.end());
  if (different.size() < 2 || different.size() < data.labels.size()) {
    throw CLI::ValidationError("--labels", "expected at least two names, all different");
  }
  if (options.training.patience > 0 && data.validation.empty() && data.validation_fraction == 0) {
    throw CLI::ValidationError("--patience", "needs --validation or --validation-fraction");
  }
}
