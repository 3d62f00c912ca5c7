#pragma once

#include "decoder.h"
#include "generate_request.h"
#include "metrics.h"

#include <torchgraft/patch/adapter_pool.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

// How a sequence ended. kCancelled: its client has gone.
enum class SequenceEnd { kStop, kLength, kCancelled, kError };

// "stop", "length", "cancelled", "error"
const char* to_string(SequenceEnd end);

// A prompt and what is written behind it, with the adapter of `lease`.
struct Sequence {
  torchgraft::AdapterPool::Lease lease;  // keeps the adapter as it is until the end
  GenerateRequest request;
  std::function<bool()> is_gone;  // whether nobody waits for the sequence any more
  // The batcher's thread calls these: the first for each token, then the second, once; `error` is null unless kError.
  std::function<void(int64_t token)> on_token;
  std::function<void(SequenceEnd end, const RequestError* error)> on_end;

  int64_t most_tokens() const { return most_cached_tokens(request); }  // in its cache
};

struct SequenceLimits {
  size_t rows = 64;              // sequences that run
  size_t waiting = 1024;         // sequences that wait; submit() refuses more
  int64_t prompt_tokens = 8192;  // of the prompts that begin between two steps, unless a single one has more
  int64_t cache_tokens = 65536;  // that the caches of running sequences may come to, padding included
};

// Continuous batching: sequences join and leave between steps, whatever their adapters. A prompt runs alone, in one
// pass, so that gates, which pool over the tokens of a pass, are those of the sequence alone. Between two steps as many
// prompts begin as `prompt_tokens` allows, in order of arrival: sequences that run never wait for more. Those that may
// come to similar lengths share a pass, so that a long one costs the short ones no padding; where the decoder takes no
// positions, only those that have as many tokens, without padding. A sequence begins when the cache has room for the
// most tokens that its own may come to; so none is stopped for want of room.
class SequenceBatcher {
 public:
  SequenceBatcher(const SequenceLimits& limits, const DecoderForm& form, Metrics& metrics);
  SequenceBatcher(const SequenceBatcher&) = delete;
  SequenceBatcher& operator=(const SequenceBatcher&) = delete;
  ~SequenceBatcher();

  // Ends all sequences, with 503, and accepts no more. One thread may call it.
  void stop();

  // Returns false, and leaves `sequence` as it was, when as many wait as may, or after stop(). The sequence must have
  // at most SequenceLimits::cache_tokens in its cache.
  bool submit(Sequence& sequence);

  size_t waiting() const;
  int64_t running() const { return running_; }
  int64_t cached_tokens() const { return cached_tokens_; }  // padding included

 private:
  struct Row;
  struct Batch;

  void serve();
  std::optional<Sequence> take(int64_t begun_tokens);
  void drop_gone();
  void drop_gone(Batch& batch);
  bool has_room(const Sequence& sequence) const;
  Batch* find_batch(const Sequence& sequence);
  const Batch* find_batch(const Sequence& sequence) const;
  void begin(Sequence sequence);
  void run_prompt(std::vector<Row>& row);
  void drop_gone_and_advance(Batch& batch);
  void advance(Batch& batch);
  void advance_each_half(Batch& batch);
  void write(Row& row, const at::Tensor& logits);
  void end(Row& row, SequenceEnd how, const RequestError* error);
  void end(Sequence& sequence, SequenceEnd how, const RequestError* error);
  void fail(std::vector<Row>& rows, const RequestError& error);
  void count();

  const SequenceLimits limits_;
  const DecoderForm form_;
  Metrics& metrics_;
  std::atomic<int64_t> running_{0};
  std::atomic<int64_t> cached_tokens_{0};
  std::list<Batch> batches_;  // of the thread alone
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::list<Sequence> waiting_;
  bool stopping_ = false;
  std::thread thread_;
};
