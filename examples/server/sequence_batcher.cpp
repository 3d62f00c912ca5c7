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

// A sequence that runs, until its batch drops it.
struct SequenceBatcher::Row {
  Sequence sequence;
  Sampler sampler;
  int64_t written = 0;
  int64_t last = 0;  // the token that the next step reads
  bool has_ended = false;
};

// Sequences that share passes: of one module, and of similar length. What throws changes nothing.
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

  void drop_ended() {
    std::vector<int64_t> numbers;
    for (size_t i = 0; i < rows.size(); ++i) {
      if (!rows[i].has_ended) {
        numbers.push_back(static_cast<int64_t>(i));
      }
    }
    if (numbers.size() < rows.size()) {
      state = numbers.empty() ? DecoderState() : select_rows(state, numbers);
      std::erase_if(rows, [](const Row& row) { return row.has_ended; });
    }
  }

  void take_over(std::vector<Row>& more, const DecoderState& theirs) {
    if (more.empty()) {
      return;
    }
    rows.reserve(rows.size() + more.size());
    state = rows.empty() ? theirs : join_rows(state, theirs);
    std::move(more.begin(), more.end(), std::back_inserter(rows));
    more.clear();
  }
};

namespace {

// Sequences of one class share passes: what each may come to is above a quarter of what the longest may come to. What
// they have now may differ more.
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
      drop_gone_and_advance(batch);
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
  std::list<Sequence> dropped;
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

// Ends the sequences whose clients have gone. Those that run keep their room until the next step.
void SequenceBatcher::drop_gone() {
  std::list<Sequence> gone;
  {
    const std::lock_guard lock(mutex_);
    for (auto next = waiting_.begin(); next != waiting_.end();) {
      const auto sequence = next++;
      if (sequence->is_gone()) {
        gone.splice(gone.end(), waiting_, sequence);
      }
    }
  }
  for (Sequence& sequence : gone) {
    end(sequence, SequenceEnd::kCancelled, nullptr);
  }
}

void SequenceBatcher::drop_gone(Batch& batch) {
  for (Row& row : batch.rows) {
    if (row.sequence.is_gone()) {
      end(row, SequenceEnd::kCancelled, nullptr);
    }
  }
  batch.drop_ended();
}

// Whether the caches have room for it even when every sequence comes to its most tokens.
bool SequenceBatcher::has_room(const Sequence& sequence) const {
  const int64_t most = sequence.most_tokens();
  const Batch* joined = find_batch(sequence);
  size_t rows = 1;
  int64_t tokens = joined ? 0 : most;
  for (const Batch& batch : batches_) {
    const auto size = static_cast<int64_t>(batch.rows.size());
    rows += batch.rows.size();
    tokens += &batch == joined ? (size + 1) * std::max(most, batch.most_tokens()) : size * batch.most_tokens();
  }
  return rows == 1 || (rows <= limits_.rows && tokens <= limits_.cache_tokens);
}

// The batch that a sequence joins behind its prompt; null: a new one.
const SequenceBatcher::Batch* SequenceBatcher::find_batch(const Sequence& sequence) const {
  const auto prompt = static_cast<int64_t>(sequence.request.prompt.size());
  for (const Batch& batch : batches_) {
    if (!batch.rows.empty() && batch.longest_class == class_of(sequence.most_tokens()) &&
        batch.rows.front().sequence.lease.same_module(sequence.lease) &&
        (batch.decoder.has_positions() || batch.state.tokens() == prompt)) {
      return &batch;
    }
  }
  return nullptr;
}

SequenceBatcher::Batch* SequenceBatcher::find_batch(const Sequence& sequence) {
  return const_cast<Batch*>(std::as_const(*this).find_batch(sequence));
}

void SequenceBatcher::begin(Sequence sequence) {
  std::vector<Row> row;
  try {
    Sampler sampler(sequence.request.sampling, 1);
    row.reserve(1);
    row.push_back({std::move(sequence), std::move(sampler)});
  } catch (const std::exception& failure) {
    const RequestError error(500, torchgraft::one_line(failure));
    end(sequence, SequenceEnd::kError, &error);
    return;
  }
  try {
    run_prompt(row);
  } catch (const std::exception& error) {
    fail(row, RequestError(500, "the model failed: " + torchgraft::one_line(error)));
  }
}

// Runs the prompt, alone.
void SequenceBatcher::run_prompt(std::vector<Row>& row) {
  const Sequence& sequence = row.front().sequence;
  Batch* batch = find_batch(sequence);
  if (!batch) {
    batches_.push_back(
        {Decoder(sequence.lease.module(), "the model", form_), class_of(sequence.most_tokens()), {}, {}});
    batch = &batches_.back();
  }
  const at::Tensor ids = at::tensor(sequence.request.prompt, at::kLong).unsqueeze(0);
  DecoderState state = batch->decoder.start(1, sequence.lease.ids());
  const at::Tensor logits = batch->decoder.step(state, ids, at::ones_like(ids, at::kBool));
  metrics_.prompt_tokens += sequence.request.prompt.size();
  write(row.front(), logits[0]);
  if (!row.front().has_ended) {
    batch->take_over(row, state);
  }
}

// An error that is of no sequence, such as too little memory, ends all that share the batch.
void SequenceBatcher::drop_gone_and_advance(Batch& batch) {
  try {
    drop_gone(batch);
    advance(batch);
  } catch (const std::exception& error) {
    fail(batch.rows, RequestError(500, torchgraft::one_line(error)));
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
  for (int64_t i = 0; i < size; ++i) {
    write(batch.rows[static_cast<size_t>(i)], logits[i]);
  }
  batch.drop_ended();
}

void SequenceBatcher::advance_each_half(Batch& batch) {
  const size_t middle = batch.rows.size() / 2;
  std::vector<int64_t> first, second;
  for (size_t i = 0; i < batch.rows.size(); ++i) {
    (i < middle ? first : second).push_back(static_cast<int64_t>(i));
  }
  DecoderState state = select_rows(batch.state, first);
  Batch rest{batch.decoder, batch.longest_class, {}, select_rows(batch.state, second)};
  rest.rows.reserve(second.size());
  const auto begin = batch.rows.begin() + static_cast<std::ptrdiff_t>(middle);
  std::move(begin, batch.rows.end(), std::back_inserter(rest.rows));
  batch.state = std::move(state);
  batch.rows.erase(begin, batch.rows.end());
  drop_gone_and_advance(batch);
  drop_gone_and_advance(rest);
  try {
    batch.take_over(rest.rows, rest.state);
  } catch (const std::exception& error) {
    fail(rest.rows, RequestError(500, torchgraft::one_line(error)));
  }
}

// Chooses the next token of a sequence, and ends the sequence if that is its last one.
void SequenceBatcher::write(Row& row, const at::Tensor& logits) {
  const GenerateRequest& request = row.sequence.request;
  try {
    row.last = row.sampler.choose(0, logits);
    row.sequence.on_token(row.last);
  } catch (const std::exception& failure) {
    const RequestError error(500, "the model failed: " + torchgraft::one_line(failure));
    end(row, SequenceEnd::kError, &error);
    return;
  }
  ++row.written;
  ++metrics_.generated_tokens;
  if (std::binary_search(request.stop.begin(), request.stop.end(), row.last)) {
    end(row, SequenceEnd::kStop, nullptr);
  } else if (row.written == request.max_new_tokens) {
    end(row, SequenceEnd::kLength, nullptr);
  }
}

void SequenceBatcher::end(Row& row, SequenceEnd how, const RequestError* error) {
  if (!std::exchange(row.has_ended, true)) {
    end(row.sequence, how, error);
  }
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
    end(row, SequenceEnd::kError, &error);
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
