#pragma once

#include "model.h"

#include <torchgraft/patch/adapter_pool.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

// The rows of one request. They stay together, and all use the adapter of `lease`.
struct Work {
  torchgraft::AdapterPool::Lease lease;
  TokenRows rows;
  Pooling pooling = Pooling::kFirst;  // kHead only if the adapter has one
  bool is_alone = false;              // whether it shares a batch with no other
  // A worker calls it once, with the outputs and a null `error`, or with what went wrong. Nobody calls it when stop(),
  // or a worker that ran out of memory, drops the work.
  std::function<void(Outputs outputs, const std::string* error)> done;
  std::chrono::steady_clock::time_point arrived = std::chrono::steady_clock::now();
};

struct BatchLimits {
  size_t rows = 64;                      // in a batch
  size_t tokens = 8192;                  // in a batch, padding included; a single request may have more
  size_t queued_rows = 1024;             // that wait; submit() refuses more
  std::chrono::microseconds wait{2000};  // how long the oldest request waits for others
};

// Makes batches of requests, whatever their adapters, and runs them in order of arrival. A worker takes a batch when it
// is full or its oldest request has waited long enough. While all workers are busy the next batch grows.
class Batcher {
 public:
  using Run = std::function<void(std::vector<Work> batch)>;

  Batcher(const BatchLimits& limits, int workers, Run run);
  Batcher(const Batcher&) = delete;
  Batcher& operator=(const Batcher&) = delete;
  ~Batcher();

  // Waits for running batches, drops the queue, and accepts no more. One thread may call it.
  void stop();

  // Returns false, and leaves `work` as it was, when the queue is full or stopped.
  bool submit(Work& work);

  size_t queued_rows() const;

 private:
  void serve();
  std::vector<Work> take();  // the caller holds mutex_; the queue is not empty

  const BatchLimits limits_;
  const Run run_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> queue_;
  size_t queued_rows_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};
