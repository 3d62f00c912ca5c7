#pragma once

#include "adapter_store.h"
#include "batcher.h"
#include "metrics.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

// A thread for what may take long and must not hold up the others: reading adapters from disk. In order of arrival.
class JobThread {
 public:
  JobThread();
  JobThread(const JobThread&) = delete;
  JobThread& operator=(const JobThread&) = delete;
  ~JobThread();

  // Waits for the job that runs, drops the others, and accepts no more. For one thread.
  void stop();

  bool add(std::function<void()> job);  // false when it is stopped

 private:
  void serve();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
  bool stopping_ = false;
  std::thread thread_;
};

struct ServiceOptions {
  BatchLimits batch;
  int workers = 1;
  size_t tokens = 512;  // of a row
  int64_t pad_id = 0;
  int64_t vocabulary = 0;  // token ids are below it; 0: what the model's embedding says, if it is found
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

  // `store` must outlive it.
  Service(AdapterStore& store, const torch::jit::Module& module, const ServiceOptions& options);

  // Waits for what runs and drops what waits, whose `done` is destroyed without a call; from then on requests are
  // answered with 503. For one thread.
  void stop();

  // Calls `done` once, from whatever thread; not before an adapter that is not in memory has been fetched, but returns
  // at once. An empty adapter is the base model. Throws RequestError for what is wrong with the request itself, and 503
  // when too many rows wait already.
  // Without `pooling`: the logits of the adapter's head if it has one, else the hidden state of the first token.
  void predict(const std::string& adapter, TokenRows rows, std::optional<Pooling> pooling, Done done);

  // Work for the thread that reads adapters. Throws RequestError 503 when it is stopped.
  void in_background(std::function<void()> job);

  AdapterStore& store() { return store_; }
  Metrics& metrics() { return metrics_; }
  // Rows that wait for a batch or for their adapter.
  size_t queued_rows() const { return waiting_rows_ + batcher_.queued_rows(); }

 private:
  void check(const TokenRows& rows) const;
  void fetch_first(const std::string& adapter, TokenRows rows, std::optional<Pooling> pooling, Done done);
  void enqueue(torchgraft::AdapterPool::Lease lease, TokenRows rows, std::optional<Pooling> pooling, const Done& done);
  void run(std::vector<Work> batch);
  std::optional<std::string> pass(const std::vector<Work>& batch, std::vector<Outputs>& outputs);

  AdapterStore& store_;
  const ServiceOptions options_;
  const Signature signature_;
  const std::optional<int64_t> vocabulary_;
  Metrics metrics_;
  std::atomic<size_t> waiting_rows_{0};  // for their adapters
  Batcher batcher_;
  JobThread jobs_;  // ends before the batcher, which it feeds
};
