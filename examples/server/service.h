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

// A thread for slow jobs, such as reading adapters from disk, that must not hold up the others. In order of arrival.
class JobThread {
 public:
  JobThread();
  JobThread(const JobThread&) = delete;
  JobThread& operator=(const JobThread&) = delete;
  ~JobThread();

  // Waits for the running job, drops the others, and accepts no more. One thread may call it.
  void stop();

  bool add(std::function<void()> job);  // false once it is stopped

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

  // `store` must outlive it.
  Service(AdapterStore& store, const torch::jit::Module& module, const ServiceOptions& options);

  // Waits for what runs, and drops what waits without a call of `done`. Later requests fail with 503. One thread may
  // call it.
  void stop();

  // Returns at once; calls `done` once, from any thread, when the adapter is in memory and the forward pass has ended.
  // An empty adapter is the base model. Throws RequestError for a wrong request, and 503 when too many rows wait.
  // Without `pooling`: the logits of the adapter's head if it has one, else the hidden state of the first token.
  void predict(const std::string& adapter, TokenRows rows, std::optional<Pooling> pooling, Done done);

  // Gives the thread that reads adapters a job. Throws RequestError 503 once it is stopped.
  void in_background(std::function<void()> job);

  // Gives a job to another thread, which waits for no adapter: it looks into the folder.
  void beside(std::function<void()> job);

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
  const torchgraft::TextLimits limits_;  // of the model, or what the options say
  Metrics metrics_;
  std::atomic<size_t> waiting_rows_{0};  // for their adapters
  Batcher batcher_;
  JobThread jobs_;  // ends before the batcher, which it feeds
  JobThread looks_;
};
