#include "generate_service.h"

#include <torchgraft/patch/inspect.h>
#include <torchgraft/patch/text_limits.h>
#include <torchgraft/registration/error_text.h>

#include <c10/util/Exception.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace {

constexpr size_t kIdsArgument = 1;  // of forward, behind self
constexpr size_t kPositionsArgument = 3;

SequenceLimits with_cache_tokens(SequenceLimits limits, int64_t cache_bytes, int64_t bytes_per_token) {
  limits.cache_tokens = cache_bytes / (2 * bytes_per_token);
  if (limits.cache_tokens < 2) {
    throw std::runtime_error("expected room in the caches for at least 2 tokens, of " +
                             std::to_string(2 * bytes_per_token) + " bytes each with the copy that a step makes, got " +
                             std::to_string(cache_bytes) + " bytes; raise --max-cache-bytes");
  }
  return limits;
}

GenerateOptions with_vocabulary(GenerateOptions options, const torch::jit::Module& module) {
  if (options.vocabulary == 0) {
    options.vocabulary = torchgraft::rows_indexed_by(module, kIdsArgument).value_or(0);
  }
  return options;
}

// Of a decoder that has been tried out.
int64_t bytes_of_token(const torch::jit::Module& module, const DecoderForm& form) {
  const Decoder decoder(module, "the model", form);
  decoder.try_out();
  return decoder.bytes_per_token();
}

}  // namespace

std::optional<DecoderForm> find_decoder_form(const torch::jit::Module& module, DecoderForm given) {
  const torchgraft::Structure structure = torchgraft::inspect(module);
  int64_t layers = 0;
  DecoderForm found;
  for (const torchgraft::Layer& layer : structure.layers) {
    if (layer.cache == torchgraft::CacheKind::kNone) {
      continue;
    }
    TORCH_CHECK(layer.cache == torchgraft::CacheKind::kGrowing, "expected caches of keys and values that grow, but ",
                "attention ", layer.index, " has one that is ", torchgraft::to_string(layer.cache),
                "; export the decoder with caches that torch.cat makes longer (docs/generation.md)");
    TORCH_CHECK(layers == 0 || (layer.num_kv_heads == found.heads && layer.head_dim == found.head_size),
                "expected caches of one size in all layers, got ", found.heads, " heads of ", found.head_size, " and ",
                layer.num_kv_heads, " of ", layer.head_dim, " in attention ", layer.index);
    found.heads = layer.num_kv_heads;
    found.head_size = layer.head_dim;
    ++layers;
  }
  if (layers == 0) {
    return std::nullopt;
  }
  given.heads = given.heads > 0 ? given.heads : found.heads;
  given.head_size = given.head_size > 0 ? given.head_size : found.head_size;
  given.layers = given.layers > 0 ? given.layers : layers;
  if (given.max_positions == 0 && takes_positions(module)) {
    given.max_positions = torchgraft::rows_indexed_by(module, kPositionsArgument).value_or(0);
  }
  return given;
}

GenerateService::GenerateService(AdapterStore& store, Background& background, Metrics& metrics,
                                 const torch::jit::Module& module, const DecoderForm& form,
                                 const GenerateOptions& options)
    : options_(with_vocabulary(options, module)),
      form_(form),
      bytes_per_token_(bytes_of_token(module, form)),
      limits_(with_cache_tokens(options.limits, options.cache_bytes, bytes_per_token_)),
      fetches_(store, background, metrics),
      batcher_(limits_, form_, metrics) {}

void GenerateService::check(const GenerateRequest& request) const {
  const auto expect = [&](int64_t most, int64_t limit, const std::string& what) {
    if (most > limit) {
      throw RequestError(413, "expected at most " + std::to_string(limit) + " tokens" + what + ", got " +
                                  std::to_string(request.prompt.size()) + " and \"max_new_tokens\" " +
                                  std::to_string(request.max_new_tokens));
    }
  };
  const int64_t cached = most_cached_tokens(request);
  if (form_.max_positions > 0) {
    expect(cached, form_.max_positions, " before the last one, which the model has positions for");
  }
  expect(cached + 1, options_.tokens, ", a prompt and what is written behind it");
  expect(cached, limits_.cache_tokens, " before the last one, for which the server has caches");
  for (const int64_t id : request.prompt) {
    if (options_.vocabulary > 0 && id >= options_.vocabulary) {
      throw RequestError(400, "expected token ids from 0 and below " + std::to_string(options_.vocabulary) +
                                  ", which the model has, got " + std::to_string(id));
    }
  }
}

void GenerateService::generate(GenerateRequest request, Client client) {
  check(request);
  const bool room = waiting() < limits_.waiting;
  const std::string adapter = request.adapter;
  auto on_lease = [this, request = std::move(request), client](torchgraft::AdapterPool::Lease lease) mutable {
    enqueue(std::move(lease), std::move(request), client);
  };
  const auto on_fault = [client](const RequestError* error) {
    client.on_end(error ? SequenceEnd::kError : SequenceEnd::kCancelled, error);
  };
  fetches_.fetch({adapter, 1, client.is_gone, std::move(on_lease), on_fault}, room);
}

void GenerateService::enqueue(torchgraft::AdapterPool::Lease lease, GenerateRequest request, const Client& client) {
  if (lease.splits_inputs(0)) {
    throw RequestError(422, "'" + request.adapter +
                                "' splits its tokens or its rows, of which a step has one; compose "
                                "its adapters without Split and BatchSplit");
  }
  Sequence sequence{std::move(lease), std::move(request), client.is_gone, client.on_token, client.on_end};
  if (!batcher_.submit(sequence)) {
    const RequestError failure(503, kBusy);
    client.on_end(SequenceEnd::kError, &failure);
  }
}
