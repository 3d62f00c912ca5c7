#include "sequence_batcher.h"

#include "background.h"
#include "log.h"

#include <torchgraft/registration/error_text.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <iterator>
#include <utility>

const char* to_string(SequenceEnd end) {
  switch (end) {
    case SequenceEnd::kStop:
      return "stop";
    case SequenceEnd::kLength:
      return "length";
    case SequenceEnd::kCancelled:
      return "cancelled";
    case SequenceEnd::kError:
      return "error";
  }
  return "";
}

// A sequence that runs.
struct SequenceBatcher::Row {
  Sequence sequence;
  Sampler sampler;
  int64_t written = 0;
  int64_t last = 0;  // the token that the next step reads
};

// Sequences that share passes: of one module, and of similar length.
struct SequenceBatcher::Batch {
  Decoder decoder;
  int64_t longest_class = 0;
  std::vector<Row> rows;
  DecoderState state;  // of the rows, in their order

  int64_t most_tokens() const {
    int64_t most = 0;
    for (const Row& row : rows) {
      most = std::max(most, row.sequence.most_tokens());
    }
    return most;
  }

  void keep(const std::vector<int64_t>& numbers) {
    if (numbers.size() == rows.size()) {
      return;
    }
    DecoderState kept = numbers.empty() ? DecoderState() : select_rows(state, numbers);
    std::vector<Row> left;
    for (const int64_t number : numbers) {
      left.push_back(std::move(rows[static_cast<size_t>(number)]));
    }
    state = std::move(kept);
    rows = std::move(left);
  }

  void take_over(std::vector<Row>& more, const DecoderState& theirs) {
    if (more.empty()) {
      return;
    }
    state = rows.empty() ? theirs : join_rows(state, theirs);
    std::move(more.begin(), more.end(), std::back_inserter(rows));
    more.clear();
  }
};

namespace {

// Sequences of one class share passes: at most three quarters of their caches are padding.
int64_t class_of(int64_t tokens) {
  int64_t most = 128;
  while (most < tokens) {
    most *= 4;
  }
  return most;
}

}  // namespace

SequenceBatcher::SequenceBatcher(const SequenceLimits& limits, const DecoderForm& form, Metrics& metrics)
    : limits_(limits), form_(form), metrics_(metrics), thread_([this] { serve(); }) {}

SequenceBatcher::~SequenceBatcher() { stop(); }

void SequenceBatcher::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) {
    thread_.join();
  }
}

bool SequenceBatcher::submit(Sequence& sequence) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_ || waiting_.size() >= limits_.waiting) {
      return false;
    }
    waiting_.push_back(std::move(sequence));
  }
  changed_.notify_one();
  return true;
}

size_t SequenceBatcher::waiting() const {
  const std::lock_guard lock(mutex_);
  return waiting_.size();
}

void SequenceBatcher::serve() {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stopping_ || !waiting_.empty() || !batches_.empty(); });
      if (stopping_) {
        break;
      }
    }
    drop_gone();
    int64_t begun_tokens = 0;
    while (std::optional<Sequence> sequence = take(begun_tokens)) {
      begun_tokens += static_cast<int64_t>(sequence->request.prompt.size());
      begin(std::move(*sequence));
    }
    for (Batch& batch : batches_) {
      try {
        advance(batch);
      } catch (const std::exception& error) {  // out of memory
        fail(batch.rows, RequestError(500, torchgraft::one_line(error)));
      }
    }
    batches_.remove_if([](const Batch& batch) { return batch.rows.empty(); });
    count();
  }
  const RequestError ending(503, kEnding);
  for (Batch& batch : batches_) {
    fail(batch.rows, ending);
  }
  batches_.clear();
  count();
  std::deque<Sequence> dropped;
  {
    const std::lock_guard lock(mutex_);
    dropped.swap(waiting_);
  }
  for (Sequence& sequence : dropped) {
    end(sequence, SequenceEnd::kError, &ending);
  }
}

// The sequence that begins now, if one may.
std::optional<Sequence> SequenceBatcher::take(int64_t begun_tokens) {
  const std::lock_guard lock(mutex_);
  if (stopping_ || waiting_.empty()) {
    return std::nullopt;
  }
  const auto prompt = static_cast<int64_t>(waiting_.front().request.prompt.size());
  if ((begun_tokens > 0 && begun_tokens + prompt > limits_.prompt_tokens) || !has_room(waiting_.front())) {
    return std::nullopt;
  }
  std::optional<Sequence> sequence = std::move(waiting_.front());
  waiting_.pop_front();
  return sequence;
}

// Ends the sequences whose clients have gone.
void SequenceBatcher::drop_gone() {
  std::vector<Sequence> gone;
  {
    const std::lock_guard lock(mutex_);
    const auto first = std::stable_partition(waiting_.begin(), waiting_.end(),
                                             [](const Sequence& sequence) { return !sequence.is_gone(); });
    std::move(first, waiting_.end(), std::back_inserter(gone));
    waiting_.erase(first, waiting_.end());
  }
  for (Sequence& sequence : gone) {
    end(sequence, SequenceEnd::kCancelled, nullptr);
  }
  for (Batch& batch : batches_) {
    std::vector<int64_t> kept;
    for (size_t i = 0; i < batch.rows.size(); ++i) {
      if (batch.rows[i].sequence.is_gone()) {
        end(batch.rows[i].sequence, SequenceEnd::kCancelled, nullptr);
      } else {
        kept.push_back(static_cast<int64_t>(i));
      }
    }
    batch.keep(kept);
  }
}

// Whether the caches have room for it even when every sequence comes to its most tokens.
bool SequenceBatcher::has_room(const Sequence& sequence) const {
  const int64_t most = sequence.most_tokens();
  size_t rows = 1;
  int64_t tokens = 0;
  bool is_counted = false;
  for (const Batch& batch : batches_) {
    const auto size = static_cast<int64_t>(batch.rows.size());
    rows += batch.rows.size();
    if (!is_counted && size > 0 && batch.longest_class == class_of(most) &&
        batch.rows.front().sequence.lease.same_module(sequence.lease)) {
      tokens += (size + 1) * std::max(most, batch.most_tokens());
      is_counted = true;
    } else {
      tokens += size * batch.most_tokens();
    }
  }
  tokens += is_counted ? 0 : most;
  return rows == 1 || (rows <= limits_.rows && tokens <= limits_.cache_tokens);
}

SequenceBatcher::Batch& SequenceBatcher::batch_for(const Sequence& sequence) {
  const int64_t longest = class_of(sequence.most_tokens());
  for (Batch& batch : batches_) {
    if (!batch.rows.empty() && batch.longest_class == longest &&
        batch.rows.front().sequence.lease.same_module(sequence.lease)) {
      return batch;
    }
  }
  batches_.push_back({Decoder(sequence.lease.module(), "the model", form_), longest, {}, {}});
  return batches_.back();
}

// Runs the prompt, alone.
void SequenceBatcher::begin(Sequence sequence) {
  std::vector<Row> row;
  Sampler sampler(sequence.request.sampling, 1);
  row.push_back({std::move(sequence), std::move(sampler)});
  try {
    const Sequence& begun = row.front().sequence;
    Batch& batch = batch_for(begun);
    const at::Tensor ids = at::tensor(begun.request.prompt, at::kLong).unsqueeze(0);
    DecoderState state = batch.decoder.start(1, begun.lease.ids());
    const at::Tensor logits = batch.decoder.step(state, ids, at::ones_like(ids, at::kBool));
    metrics_.prompt_tokens += begun.request.prompt.size();
    if (write(row.front(), logits[0])) {
      batch.take_over(row, state);
    }
  } catch (const std::exception& error) {
    fail(row, RequestError(500, "the model failed: " + torchgraft::one_line(error)));
  }
}

// One step of all its sequences. If it fails, each half runs by itself, so that an error goes only to sequences that
// fail alone.
void SequenceBatcher::advance(Batch& batch) {
  if (batch.rows.empty()) {
    return;
  }
  const auto size = static_cast<int64_t>(batch.rows.size());
  at::Tensor logits;
  try {
    std::vector<int64_t> last;
    for (const Row& row : batch.rows) {
      last.push_back(row.last);
    }
    const at::Tensor ids = at::tensor(last, at::kLong).unsqueeze(1);
    logits = batch.decoder.step(batch.state, ids, at::ones_like(ids, at::kBool));
  } catch (const std::exception& error) {
    if (size > 1) {
      advance_each_half(batch);
    } else {
      fail(batch.rows, RequestError(500, "the model failed: " + torchgraft::one_line(error)));
    }
    return;
  }
  metrics_.batch_rows.observe(static_cast<double>(size));
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < size; ++i) {
    if (write(batch.rows[static_cast<size_t>(i)], logits[i])) {
      kept.push_back(i);
    }
  }
  batch.keep(kept);
}

void SequenceBatcher::advance_each_half(Batch& batch) {
  std::vector<int64_t> first, second;
  for (size_t i = 0; i < batch.rows.size(); ++i) {
    (i < batch.rows.size() / 2 ? first : second).push_back(static_cast<int64_t>(i));
  }
  DecoderState state = select_rows(batch.state, first);
  Batch rest{batch.decoder, batch.longest_class, {}, select_rows(batch.state, second)};
  const auto middle = batch.rows.begin() + static_cast<std::ptrdiff_t>(first.size());
  std::move(middle, batch.rows.end(), std::back_inserter(rest.rows));
  batch.state = std::move(state);
  batch.rows.erase(middle, batch.rows.end());
  advance(batch);
  advance(rest);
  batch.take_over(rest.rows, rest.state);
}

// Chooses the next token of a sequence. Returns whether the sequence goes on.
bool SequenceBatcher::write(Row& row, const at::Tensor& logits) {
  Sequence& sequence = row.sequence;
  try {
    row.last = row.sampler.choose(0, logits);
  } catch (const std::exception& failure) {
    const RequestError error(500, "the model failed: " + torchgraft::one_line(failure));
    end(sequence, SequenceEnd::kError, &error);
    return false;
  }
  ++row.written;
  ++metrics_.generated_tokens;
  sequence.on_token(row.last);
  const bool is_stop = sequence.request.stop.count(row.last) > 0;
  if (is_stop || row.written == sequence.request.max_new_tokens) {
    end(sequence, is_stop ? SequenceEnd::kStop : SequenceEnd::kLength, nullptr);
    return false;
  }
  return true;
}

void SequenceBatcher::end(Sequence& sequence, SequenceEnd how, const RequestError* error) {
  try {
    metrics_.sequences.add(to_string(how));
    sequence.on_end(how, error);
  } catch (const std::exception& failure) {  // out of memory for an answer
    log_line(std::string("server: a sequence was dropped: ") + failure.what());
  }
}

void SequenceBatcher::fail(std::vector<Row>& rows, const RequestError& error) {
  for (Row& row : rows) {
    end(row.sequence, SequenceEnd::kError, &error);
  }
  rows.clear();
}

void SequenceBatcher::count() {
  int64_t running = 0;
  int64_t tokens = 0;
  for (const Batch& batch : batches_) {
    running += static_cast<int64_t>(batch.rows.size());
    tokens += batch.rows.empty() ? 0 : batch.state.rows() * batch.state.tokens();
  }
  running_ = running;
  cached_tokens_ = tokens;
}
