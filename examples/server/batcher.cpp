#include "batcher.h"

#include "log.h"

#include <algorithm>
#include <utility>

Batcher::Batcher(const BatchLimits& limits, int workers, Run run) : limits_(limits), run_(std::move(run)) {
  for (int i = 0; i < workers; ++i) {
    workers_.emplace_back([this] { serve(); });
  }
}

Batcher::~Batcher() { stop(); }

void Batcher::stop() {
  std::deque<Work> dropped;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    dropped.swap(queue_);
    queued_rows_ = 0;
  }
  changed_.notify_all();
  dropped.clear();  // these clients get their answers before the running batches end
  for (std::thread& worker : workers_) {
    worker.join();
  }
  workers_.clear();
}

bool Batcher::submit(Work& work) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_ || queued_rows_ + work.rows.size() > limits_.queued_rows) {
      return false;
    }
    queued_rows_ += work.rows.size();
    queue_.push_back(std::move(work));
  }
  changed_.notify_one();
  return true;
}

size_t Batcher::queued_rows() const {
  const std::lock_guard lock(mutex_);
  return queued_rows_;
}

// Takes from the front of the queue as much as makes one batch: at least one request, of one module, within the limits.
std::vector<Work> Batcher::take() {
  std::vector<Work> batch;
  size_t rows = 0;
  size_t longest = 0;
  while (!queue_.empty()) {
    Work& next = queue_.front();
    const size_t new_longest = std::max(longest, longest_row(next.rows));
    const size_t new_rows = rows + next.rows.size();
    const bool fits = new_rows <= limits_.rows && new_rows * new_longest <= limits_.tokens;
    const bool is_alone = !batch.empty() && (next.is_alone || batch.front().is_alone);
    if (!batch.empty() && (is_alone || !fits || !next.lease.same_module(batch.front().lease))) {
      break;
    }
    rows = new_rows;
    longest = new_longest;
    batch.push_back(std::move(next));
    queue_.pop_front();
  }
  queued_rows_ -= rows;
  return batch;
}

void Batcher::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) {
      return;
    }
    changed_.wait_until(lock, queue_.front().arrived + limits_.wait,
                        [&] { return stopping_ || queue_.empty() || queued_rows_ >= limits_.rows; });
    if (queue_.empty()) {  // another worker took the batch
      continue;
    }
    std::vector<Work> batch = take();
    const bool is_more = !queue_.empty();
    lock.unlock();
    if (is_more) {  // no arrival will wake a worker for the rest
      changed_.notify_one();
    }
    try {
      run_(std::move(batch));
    } catch (const std::exception& error) {  // out of memory: this batch is lost, the next ones run
      log_line(std::string("server: a batch was dropped: ") + error.what());
    }
    lock.lock();
  }
}
