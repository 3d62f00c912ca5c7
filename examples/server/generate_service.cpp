#include "generate_service.h"

#include <torchgraft/patch/inspect.h>
#include <torchgraft/registration/error_text.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

namespace {

SequenceLimits with_cache_tokens(SequenceLimits limits, int64_t cache_bytes, int64_t bytes_per_token) {
  limits.cache_tokens = cache_bytes / (2 * bytes_per_token);
  return limits;
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
  return given;
}

GenerateService::GenerateService(AdapterStore& store, Background& background, Metrics& metrics,
                                 const torch::jit::Module& module, const DecoderForm& form,
                                 const GenerateOptions& options)
    : store_(store),
      background_(background),
      metrics_(metrics),
      options_(options),
      form_(form),
      bytes_per_token_(Decoder(module, "the model", form).bytes_per_token()),
      limits_(with_cache_tokens(options.limits, options.cache_bytes, bytes_per_token_)),
      batcher_(limits_, form_, metrics) {}

void GenerateService::check(const GenerateRequest& request) const {
  const int64_t most = static_cast<int64_t>(request.prompt.size()) + request.max_new_tokens;
  const auto expect = [&](int64_t limit, const std::string& why) {
    if (most > limit) {
      throw RequestError(413, "expected at most " + std::to_string(limit) + " tokens, " + why + ", got " +
                                  std::to_string(request.prompt.size()) + " and \"max_new_tokens\" " +
                                  std::to_string(request.max_new_tokens));
    }
  };
  if (form_.max_positions > 0) {
    expect(form_.max_positions, "which the model has positions for");
  }
  expect(options_.tokens, "a prompt and what is written behind it");
  expect(limits_.cache_tokens, "for which the server has caches");
  for (const int64_t id : request.prompt) {
    if (options_.vocabulary > 0 && id >= options_.vocabulary) {
      throw RequestError(
          400, "expected token ids below " + std::to_string(options_.vocabulary) + ", got " + std::to_string(id));
    }
  }
}

void GenerateService::generate(GenerateRequest request, Client client) {
  check(request);
  auto lease = store_.try_acquire(request.adapter);
  if (lease) {
    metrics_.adapter_requests.add(metric_label(request.adapter));
    enqueue(std::move(*lease), std::move(request), client);
  } else {
    fetch_first(std::move(request), std::move(client));
  }
}

void GenerateService::fetch_first(GenerateRequest request, Client client) {
  if (waiting() >= limits_.waiting) {
    throw RequestError(503, kBusy);
  }
  ++fetching_;
  // Ends the count when the job is done or dropped.
  const std::shared_ptr<void> fetching(nullptr, [this](void*) { --fetching_; });
  background_.run([this, request = std::move(request), client = std::move(client), fetching]() mutable {
    try {
      auto lease = store_.acquire(request.adapter);
      metrics_.adapter_requests.add(metric_label(request.adapter));
      enqueue(std::move(lease), std::move(request), client);
    } catch (const RequestError& error) {
      client.on_end(SequenceEnd::kError, &error);
    } catch (const std::exception& error) {
      const RequestError failure(500, torchgraft::one_line(error));
      client.on_end(SequenceEnd::kError, &failure);
    }
  });
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
