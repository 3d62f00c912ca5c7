#include "service.h"

#include <torchgraft/registration/error_text.h>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>

namespace {

constexpr const char* kOtherSizes = " which is not equal to the sum of ";  // of a Split or BatchSplit

// The names of a head's labels, by number; empty unless every label has one.
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

// The answers to one request of a batch; its rows begin at `first`.
Outputs outputs_of(const Work& work, const Signature::Result& result, int64_t first) {
  const auto count = static_cast<int64_t>(work.rows.size());
  const at::Tensor states = result.states.narrow(0, first, count);
  if (work.pooling != Pooling::kHead) {
    return pool_states(states, work.rows, work.pooling);
  }
  return read_logits(work.lease.logits(0, states, result.mask.narrow(0, first, count)), work.rows);
}

}  // namespace

Service::Service(AdapterStore& store, Background& background, Metrics& metrics, const torch::jit::Module& module,
                 const ServiceOptions& options, Package* package)
    : metrics_(metrics),
      options_(options),
      signature_(module, options.pad_id, package),
      least_tokens_(package && !package->pads_rows() ? package->least_tokens() : 1),
      limits_{options.vocabulary > 0 ? options.vocabulary : signature_.limits().vocabulary,
              signature_.limits().positions},
      fetches_(store, background, metrics),
      batcher_(options.batch, options.workers, [this](std::vector<Work> batch) { run(std::move(batch)); }) {}

void Service::stop() { batcher_.stop(); }

void Service::check(const TokenRows& rows) const {
  if (rows.empty() || rows.size() > options_.batch.rows) {
    throw RequestError(
        400, "expected 1 to " + std::to_string(options_.batch.rows) + " rows, got " + std::to_string(rows.size()));
  }
  for (const auto& row : rows) {
    if (row.empty()) {
      throw RequestError(400, "expected at least one token in every row");
    }
    if (row.size() < least_tokens_) {
      throw RequestError(422, "expected at least " + std::to_string(least_tokens_) + " tokens in a row, got " +
                                  std::to_string(row.size()) +
                                  ": the package takes no fewer, and gates of its adapters " +
                                  "would be means over padding, too");
    }
    if (const auto fault = torchgraft::text_fault(limits_, row)) {
      throw RequestError(fault->is_too_long ? 413 : 400, fault->message);
    }
    if (row.size() > options_.tokens) {
      throw RequestError(413, "expected at most " + std::to_string(options_.tokens) + " tokens in a row, got " +
                                  std::to_string(row.size()));
    }
  }
}

void Service::predict(const std::string& adapter, TokenRows rows, std::optional<Pooling> pooling, Done done) {
  check(rows);
  const size_t count = rows.size();
  const bool room = queued_rows() + count <= options_.batch.queued_rows;
  auto on_lease = [this, rows = std::move(rows), pooling, done](torchgraft::AdapterPool::Lease lease) mutable {
    enqueue(std::move(lease), std::move(rows), pooling, done);
  };
  fetches_.fetch({adapter, count, nullptr, std::move(on_lease), [done](const RequestError* error) { done({}, error); }},
                 room);
}

void Service::enqueue(torchgraft::AdapterPool::Lease lease, TokenRows rows, std::optional<Pooling> pooling,
                      const Done& done) {
  const bool splits = lease.splits_inputs(0);
  const torchgraft::HeadConfig* head = lease.head(0);
  const Pooling answer = pooling.value_or(head ? Pooling::kHead : Pooling::kFirst);
  const bool is_logits = answer == Pooling::kHead;
  const std::vector<std::string> labels = is_logits ? labels_of(*head) : std::vector<std::string>();
  Work work{std::move(lease), std::move(rows), answer, splits,
            [done, is_logits, labels, splits](Outputs outputs, const std::string* error) {
              const bool is_of_rows = error && splits && error->find(kOtherSizes) != std::string::npos;
              const RequestError failure(is_of_rows ? 422 : 500, error ? "the model failed: " + *error : "");
              done({std::move(outputs), is_logits, labels}, error ? &failure : nullptr);
            }};
  if (!batcher_.submit(work)) {
    const RequestError failure(503, kBusy);
    done({}, &failure);
  }
}

// Runs a batch, and, if it fails, each half by itself, so that an error goes only to requests that fail alone. One bad
// request of n costs the others about 2 log2(n) smaller passes.
void Service::run(std::vector<Work> batch) {
  std::vector<Outputs> outputs;
  const std::optional<std::string> error = pass(batch, outputs);
  if (error && batch.size() > 1) {
    const auto middle = batch.begin() + static_cast<std::ptrdiff_t>(batch.size() / 2);
    std::vector<Work> rest(std::make_move_iterator(middle), std::make_move_iterator(batch.end()));
    batch.erase(middle, batch.end());
    run(std::move(batch));
    run(std::move(rest));
    return;
  }
  for (size_t i = 0; i < batch.size(); ++i) {
    batch[i].done(error ? Outputs() : std::move(outputs[i]), error ? &*error : nullptr);
  }
}

// One forward pass: appends the answers to each request to `outputs`, or returns what went wrong.
std::optional<std::string> Service::pass(const std::vector<Work>& batch, std::vector<Outputs>& outputs) {
  const c10::InferenceMode no_gradients;
  try {
    TokenRows rows;
    std::vector<int64_t> ids;
    for (const Work& work : batch) {
      rows.insert(rows.end(), work.rows.begin(), work.rows.end());
      ids.insert(ids.end(), work.rows.size(), work.lease.ids().front());
    }
    const Signature::Result result = signature_.run(batch.front().lease.module(), rows, ids);
    metrics_.batch_rows.observe(static_cast<double>(rows.size()));
    int64_t first = 0;
    for (const Work& work : batch) {
      outputs.push_back(outputs_of(work, result, first));
      first += static_cast<int64_t>(work.rows.size());
    }
    return std::nullopt;
  } catch (const std::exception& failure) {
    return torchgraft::one_line(failure);
  }
}
