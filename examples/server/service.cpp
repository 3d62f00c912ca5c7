#include "service.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <map>
#include <utility>

namespace {

// What went wrong is one line among libtorch's traces, in TorchScript's the last: "RuntimeError: gated_lora: ...".
std::string one_line(const std::string& message) {
  const std::string marker = "Error: ";
  const size_t raised = message.rfind(marker);
  const size_t begin = raised == std::string::npos ? 0 : raised + marker.size();
  return message.substr(begin, message.find('\n', begin) - begin);
}

// By number; empty unless every one has a name.
std::vector<std::string> labels_of(const torchgraft::HeadConfig& head) {
  std::vector<std::string> labels(static_cast<size_t>(head.num_labels));
  size_t named = 0;
  for (const auto& [label, number] : head.label2id.value_or(std::map<std::string, int64_t>())) {
    if (number >= 0 && number < head.num_labels && labels[static_cast<size_t>(number)].empty()) {
      labels[static_cast<size_t>(number)] = label;
      ++named;
    }
  }
  return named == labels.size() ? labels : std::vector<std::string>();
}

// What is answered to one request of a batch whose rows begin at `first`.
Outputs outputs_of(const Work& work, const Signature::Result& result, int64_t first) {
  const auto count = static_cast<int64_t>(work.rows.size());
  const at::Tensor states = result.states.narrow(0, first, count);
  if (work.pooling != Pooling::kHead) {
    return pool_states(states, work.rows, work.pooling);
  }
  return read_logits(work.lease.logits(0, states, result.mask.narrow(0, first, count)), work.rows);
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
    throw RequestError(
        400, "expected 1 to " + std::to_string(options_.batch.rows) + " rows, got " + std::to_string(rows.size()));
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

void Service::predict(const std::string& adapter, TokenRows rows, std::optional<Pooling> pooling, Done done) {
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

void Service::enqueue(torchgraft::AdapterPool::Lease lease, TokenRows rows, std::optional<Pooling> pooling,
                      const Done& done) {
  const torchgraft::HeadConfig* head = lease.head(0);
  const Pooling answer = pooling.value_or(head ? Pooling::kHead : Pooling::kFirst);
  const bool is_logits = answer == Pooling::kHead;
  const std::vector<std::string> labels = is_logits ? labels_of(*head) : std::vector<std::string>();
  Work work{std::move(lease), std::move(rows), answer,
            [done, is_logits, labels](Outputs outputs, const std::string& error) {
              const RequestError failure(400, error);
              done({std::move(outputs), is_logits, labels}, error.empty() ? nullptr : &failure);
            }};
  if (!batcher_.submit(work)) {
    const RequestError failure(503, "too many requests are waiting, or the server is about to end");
    done({}, &failure);
  }
}

// A batch that fails, because of a token that the model does not know, say, is run again request by request, so that
// the others get their answers.
void Service::run(std::vector<Work> batch) {
  const c10::InferenceMode no_gradients;
  TokenRows rows;
  std::vector<int64_t> ids;
  for (const Work& work : batch) {
    rows.insert(rows.end(), work.rows.begin(), work.rows.end());
    ids.insert(ids.end(), work.rows.size(), work.lease.ids().front());
  }
  std::vector<Outputs> outputs;
  std::string error;
  try {
    const Signature::Result result = signature_.run(batch.front().lease.module(), rows, ids);
    metrics_.batch_rows.observe(static_cast<double>(rows.size()));
    int64_t first = 0;
    for (const Work& work : batch) {
      outputs.push_back(outputs_of(work, result, first));
      first += static_cast<int64_t>(work.rows.size());
    }
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
  for (size_t i = 0; i < batch.size(); ++i) {
    batch[i].done(error.empty() ? std::move(outputs[i]) : Outputs(), error);
  }
}
