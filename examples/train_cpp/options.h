#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

struct DataOptions {
  std::string training;
  std::string validation;            // a file of its own, or
  double validation_fraction = 0.0;  // a share of `training`
  std::vector<std::string> labels;   // the classes' names; class i is the i-th
};

struct AdapterOptions {
  std::string base;
  std::string name = "task";
  std::string config = "unipelt";
  std::string gate_pooling;  // "all" or "unpadded"; empty: "all" for a new adapter, its own for one of the model's file
  std::string pooling = "first";
  int64_t head_layers = 2;
  double head_dropout = 0.0;
};

struct TrainingOptions {
  int64_t epochs = 3;
  int64_t batch_size = 32;
  int64_t accumulate = 1;  // batches of one step
  double learning_rate = 1e-3;
  double weight_decay = 0.01;
  double warmup = 0.06;  // share of all steps
  double clip = 1.0;     // 0: none
  int64_t patience = 0;  // epochs; 0: to the end
  uint64_t seed = 0;
  int64_t checkpoint_every = 100;  // steps
};

struct Options {
  DataOptions data;
  AdapterOptions adapter;
  TrainingOptions training;
  std::string output;
  std::string model_class = "BertAdapterModel";
  bool restart = false;
  int threads = 0;  // 0: libtorch's default
};

void declare(CLI::App& app, Options& options);

// Checks what CLI11 cannot check option by option; throws CLI::ValidationError.
void check(const Options& options);
