// Trains an adapter with a classification head, without Python: libtorch, libtorchgraft.so and libtorchgraft_patch.so.

#include "checkpoint.h"
#include "classifier.h"
#include "data.h"
#include "options.h"
#include "trainer.h"

#include <torchgraft/registration/error_text.h>

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <sstream>

namespace {

template <typename T>
std::string text_of(const T& value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

// The options by their names on the command line, but for how often the program writes a checkpoint.
Settings settings_of(const Options& options) {
  const AdapterOptions& adapter = options.adapter;
  const TrainingOptions& training = options.training;
  Settings settings = {{"model", file_digest(adapter.base)},
                       {"examples", file_digest(options.data.training)},
                       {"--validation", options.data.validation.empty() ? "" : file_digest(options.data.validation)},
                       {"--validation-fraction", text_of(options.data.validation_fraction)},
                       {"--adapter", adapter.name},
                       {"--config", adapter.config},
                       {"--gate-pooling", adapter.gate_pooling},
                       {"--pooling", adapter.pooling},
                       {"--head-layers", text_of(adapter.head_layers)},
                       {"--head-dropout", text_of(adapter.head_dropout)},
                       {"--epochs", text_of(training.epochs)},
                       {"--batch-size", text_of(training.batch_size)},
                       {"--accumulate", text_of(training.accumulate)},
                       {"--learning-rate", text_of(training.learning_rate)},
                       {"--weight-decay", text_of(training.weight_decay)},
                       {"--warmup", text_of(training.warmup)},
                       {"--clip", text_of(training.clip)},
                       {"--patience", text_of(training.patience)},
                       {"--seed", text_of(training.seed)}};
  for (const std::string& label : options.data.labels) {
    settings["--labels"] += (settings["--labels"].empty() ? "" : ",") + label;
  }
  return settings;
}

struct Data {
  Examples training;
  std::optional<Examples> validation;
};

Data read_data(const Options& options) {
  const auto classes = static_cast<int64_t>(options.data.labels.size());
  Data data{read_examples(options.data.training, classes), std::nullopt};
  if (!options.data.validation.empty()) {
    data.validation = read_examples(options.data.validation, classes);
  } else if (options.data.validation_fraction > 0) {
    std::tie(data.training, data.validation) =
        split(data.training, options.data.validation_fraction, options.training.seed);
  }
  check_every_class(data.training, options.data.labels);
  return data;
}

void train(const Options& options) {
  std::signal(SIGXFSZ, SIG_IGN);  // then write() reports a file that must not grow, as it does a full disk
  if (options.threads > 0) {
    at::set_num_threads(options.threads);
  }
  const Data data = read_data(options);
  at::manual_seed(options.training.seed);
  Classifier classifier(options.adapter, options.data.labels);
  std::error_code error;
  std::filesystem::create_directories(options.output, error);
  TORCH_CHECK(!error, options.output, ": cannot make the directory (", error.message(), ")");
  const CheckpointFile checkpoint(options.output + "/checkpoint.safetensors", settings_of(options));
  Trainer trainer(classifier, data.training, data.validation, options.training, checkpoint);
  trainer.run(options.restart);
  classifier.save(options.output + "/adapter", options.model_class);
  std::cout << options.output << "/adapter: adapter " << options.adapter.name;
  if (data.validation) {
    const Scores scores = trainer.score(*data.validation);
    char text[80];
    std::snprintf(text, sizeof(text), ", validation loss %.4f, accuracy %.3f", scores.loss, scores.accuracy);
    std::cout << text;
  }
  std::cout << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains an adapter and its head on tokenised texts. The same command again goes on after a kill.",
               "train_cpp");
  Options options;
  declare(app, options);
  try {
    app.parse(argc, argv);
    check(options);
    train(options);
    return 0;
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::cerr << "train_cpp: " << torchgraft::one_line(error) << " (train_cpp --help)\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "train_cpp: " << torchgraft::one_line(error) << "\n";
  }
  return 1;
}
