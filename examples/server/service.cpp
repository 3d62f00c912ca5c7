#include "service.h"

#include <c10/util/Exception.h>

#include <utility>

namespace {

// What went wrong is one line among libtorch's traces, in TorchScript's the last: "RuntimeError: gated_lora: ...".
std::string one_line(const std::string& message) {
  const std::string marker = "Error: ";
  const size_t raised = message.rfind(marker);
  const size_t begin = raised == std::string::npos ? 0 : raised + marker.size();
  return message.substr(begin, message.find('\n', begin) - begin);
}

}  // namespace

JobThread::JobThread() : thread_([this] { serve(); }) {}

JobThread::~JobThread() { stop(); }

void JobThread::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) {
    thread_.join();
  }
}

bool JobThread::add(std::function<void()> job) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) {
      return false;
    }
    jobs_.push_back(std::move(job));
  }
  changed_.notify_one();
  return true;
}

void JobThread::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
    if (jobs_.empty()) {
      return;
    }
    const auto job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    job();
    lock.lock();
  }
}

Service::Service(AdapterStore& store, const torch::jit::Module& module, const ServiceOptions& options)
    : store_(store),
      options_(options),
      signature_(module, options.pad_id),
      batcher_(options.batch, options.workers, [this](std::vector<Work> batch) { run(std::move(batch)); }) {}

void Service::stop() {
  jobs_.stop();
  batcher_.stop();
}

void Service::in_background(std::function<void()> job) {
  if (!jobs_.add(std::move(job))) {
    throw RequestError(503, "the server is about to end");
  }
}

void Service::check(const TokenRows& rows) const {
  if (rows.empty() || rows.size() > options_.batch.rows) {
    throw RequestError(400, "expected 1 to " + std::to_string(options_.batch.rows) + " rows, got " +
                                std::to_string(rows.size()));
  }
  for (const auto& row : rows) {
    if (row.empty()) {
      throw RequestError(400, "expected at least one token in every row");
    }
    if (row.size() > options_.tokens) {
      throw RequestError(413, "expected at most " + std::to_string(options_.tokens) + " tokens in a row, got " +
                                  std::to_string(row.size()));
    }
  }
}

void Service::predict(const std::string& adapter, TokenRows rows, Pooling pooling, Done done) {
  check(rows);
  auto lease = store_.try_acquire(adapter);
  metrics_.adapter_requests.add(adapter);
  if (lease) {
    enqueue(std::move(*lease), std::move(rows), pooling, done);
    return;
  }
  in_background([this, adapter, rows = std::move(rows), pooling, done = std::move(done)]() mutable {
    try {
      enqueue(store_.acquire(adapter), std::move(rows), pooling, done);
    } catch (const RequestError& error) {
      done({}, &error);
    } catch (const std::exception& error) {
      const RequestError failure(500, one_line(error.what()));
      done({}, &failure);
    }
  });
}

void Service::enqueue(torchgraft::AdapterPool::Lease lease, TokenRows rows, Pooling pooling, const Done& done) {
  Work work{std::move(lease), std::move(rows), pooling, [done](Outputs outputs, const std::string& error) {
              const RequestError failure(400, error);
              done(std::move(outputs), error.empty() ? nullptr : &failure);
            }};
  if (!batcher_.submit(work)) {
    const RequestError failure(503, "too many requests are waiting, or the server is about to end");
    done({}, &failure);
  }
}

// A batch that fails, because of a token that the model does not know, say, is run again request by request, so that the
// others get their answers.
void Service::run(std::vector<Work> batch) {
  TokenRows rows;
  std::vector<int64_t> ids;
  std::vector<Pooling> pooling;
  for (const Work& work : batch) {
    rows.insert(rows.end(), work.rows.begin(), work.rows.end());
    ids.insert(ids.end(), work.rows.size(), work.lease.ids().front());
    pooling.insert(pooling.end(), work.rows.size(), work.pooling);
  }
  Outputs outputs;
  std::string error;
  try {
    outputs = signature_.run(batch.front().lease.module(), rows, ids, pooling);
    metrics_.batch_rows.observe(static_cast<double>(rows.size()));
  } catch (const c10::Error& failure) {
    error = one_line(failure.what_without_backtrace());
  } catch (const std::exception& failure) {
    error = one_line(failure.what());
  }
  if (!error.empty() && batch.size() > 1) {
    for (Work& work : batch) {
      std::vector<Work> single;
      single.push_back(std::move(work));
      run(std::move(single));
    }
    return;
  }
  auto next = outputs.begin();
  for (Work& work : batch) {
    Outputs own;
    if (error.empty()) {
      const auto end = next + static_cast<int64_t>(work.rows.size());
      own.assign(std::make_move_iterator(next), std::make_move_iterator(end));
      next = end;
    }
    work.done(std::move(own), error);
  }
}
