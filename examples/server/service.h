#pragma once

#include "adapter_fetches.h"
#include "batcher.h"
#include "metrics.h"

#include <functional>
#include <optional>
#include <string>
#include <vector>

struct ServiceOptions {
  BatchLimits batch;
  int workers = 1;
  size_t tokens = 512;  // of a row
  int64_t pad_id = 0;
  int64_t vocabulary = 0;  // token ids must be below it; 0: the rows of the model's embedding, if the graph shows it
};

// Predictions of one model with many adapters. Knows no HTTP.
class Service {
 public:
  struct Prediction {
    Outputs outputs;
    bool is_logits = false;
    std::vector<std::string> labels;  // of logits, if the head's configuration names them
  };
  using Done = std::function<void(Prediction prediction, const RequestError* error)>;

  // What it gets must outlive it. `background` is stopped between stop() and the end. package: null, or what runs in
  // the module's place.
  Service(AdapterStore& store, Background& background, Metrics& metrics, const torch::jit::Module& module,
          const ServiceOptions& options, Package* package = nullptr);

  // Waits for what runs, and drops what waits without a call of `done`. Later requests fail with 503. One thread may
  // call it.
  void stop();

  // Returns at once; calls `done` once, from any thread, when the adapter is in memory and the forward pass has ended.
  // An empty adapter is the base model. Throws RequestError for a wrong request, and 503 when too many rows wait.
  // Without `pooling`: the logits of the adapter's head if it has one, else the hidden state of the first token.
  void predict(const std::string& adapter, TokenRows rows, std::optional<Pooling> pooling, Done done);

  // Rows that wait for a batch or for their adapter.
  size_t queued_rows() const { return fetches_.waiting_rows() + batcher_.queued_rows(); }

 private:
  void check(const TokenRows& rows) const;
  void enqueue(torchgraft::AdapterPool::Lease lease, TokenRows rows, std::optional<Pooling> pooling, const Done& done);
  void run(std::vector<Work> batch);
  std::optional<std::string> pass(const std::vector<Work>& batch, std::vector<Outputs>& outputs);

  Metrics& metrics_;
  const ServiceOptions options_;
  const Signature signature_;
  const size_t least_tokens_;            // of a row
  const torchgraft::TextLimits limits_;  // of the model, or what the options say
  AdapterFetches fetches_;
  Batcher batcher_;
};
