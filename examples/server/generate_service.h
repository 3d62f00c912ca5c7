#pragma once

#include "adapter_fetches.h"
#include "sequence_batcher.h"

#include <torch/csrc/jit/api/module.h>

#include <functional>
#include <optional>

struct GenerateOptions {
  SequenceLimits limits;                   // cache_tokens follows from cache_bytes
  int64_t tokens = 512;                    // of a prompt and what is written behind it
  int64_t vocabulary = 0;                  // token ids must be below it; 0: as the graph shows
  int64_t cache_bytes = int64_t{1} << 30;  // of all caches; a step holds them twice, which is counted
};

// What `given` leaves out (0) as the graph shows it: heads, head size, positions and, of caches in lists, how many
// layers keep some. nullopt: the model is no decoder with caches of keys and values. Throws c10::Error when its layers
// differ, or keep them in a way that no program here can make.
std::optional<DecoderForm> find_decoder_form(const torch::jit::Module& module, DecoderForm given);

// Generates with one decoder and many adapters. Knows no HTTP.
class GenerateService {
 public:
  struct Client {
    std::function<bool()> is_gone;                                           // from any thread
    std::function<void(int64_t token)> on_token;                             // as soon as the token is known
    std::function<void(SequenceEnd end, const RequestError* error)> on_end;  // `error` is null unless kError
  };

  // What it gets must outlive it. `background` is stopped between stop() and the end. Throws std::runtime_error when
  // `module` is no decoder of this form.
  GenerateService(AdapterStore& store, Background& background, Metrics& metrics, const torch::jit::Module& module,
                  const DecoderForm& form, const GenerateOptions& options);

  // Ends all sequences with 503. Later requests fail with 503. One thread may call it.
  void stop() { batcher_.stop(); }

  // Returns at once; another thread calls the client. Throws RequestError for a wrong request, and 503 when too many
  // sequences wait.
  void generate(GenerateRequest request, Client client);

  // Sequences that wait for their adapter or for room.
  size_t waiting() const { return fetches_.waiting_rows() + batcher_.waiting(); }
  int64_t running() const { return batcher_.running(); }
  int64_t cache_bytes() const { return batcher_.cached_tokens() * bytes_per_token_; }

 private:
  void check(const GenerateRequest& request) const;
  void enqueue(torchgraft::AdapterPool::Lease lease, GenerateRequest request, const Client& client);

  const GenerateOptions options_;
  const DecoderForm form_;
  const int64_t bytes_per_token_;
  const SequenceLimits limits_;
  AdapterFetches fetches_;
  SequenceBatcher batcher_;
};
