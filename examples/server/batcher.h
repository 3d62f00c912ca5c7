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

// Rows of one request, which stay together. Each has the adapter of `lease`.
struct Work {
  torchgraft::AdapterPool::Lease lease;
  TokenRows rows;
  Pooling pooling = Pooling::kFirst;  // kHead only if the adapter has one
  // Called once, by a worker: with the outputs, or with what went wrong (null: nothing). Not called when the work is
  // dropped, by stop() or by a worker that ran out of memory.
  std::function<void(Outputs outputs, const std::string* error)> done;
  std::chrono::steady_clock::time_point arrived = std::chrono::steady_clock::now();
};

struct BatchLimits {
  size_t rows = 64;                      // of a batch
  size_t tokens = 8192;                  // of a batch, padding included, unless it is one request
  size_t queued_rows = 1024;             // waiting; more are refused
  std::chrono::microseconds wait{2000};  // for company, from the arrival of the oldest
};

// Puts requests together, whatever their adapters, and runs them. A batch is taken when it is full or its oldest
// request has waited long enough; while all workers are busy it grows by itself. Order of arrival is kept.
class Batcher {
 public:
  using Run = std::function<void(std::vector<Work> batch)>;

  Batcher(const BatchLimits& limits, int workers, Run run);
  Batcher(const Batcher&) = delete;
  Batcher& operator=(const Batcher&) = delete;
  ~Batcher();

  // Waits for the batches that run, drops what is queued, and accepts no more. For one thread.
  void stop();

  // False when the queue is full or stopped; `work` is then as it was.
  bool submit(Work& work);

  size_t queued_rows() const;

 private:
  void serve();
  std::vector<Work> take();  // needs mutex_ held and something in the queue

  const BatchLimits limits_;
  const Run run_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> queue_;
  size_t queued_rows_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};
