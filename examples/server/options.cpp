#include "options.h"

#include "../number_option.h"
#include "../quantized_engine.h"

#include <algorithm>
#include <array>

namespace {

// Without a meaning for the other kind of model.
constexpr std::array<const char*, 6> kOfDecoders = {"--heads",         "--head-size",      "--layers",
                                                    "--max-positions", "--mask-of-tokens", "--max-cache-bytes"};
constexpr std::array<const char*, 4> kOfEncoders = {"--workers", "--max-wait-us", "--pad-id", "--package"};
// A package runs no compositions.
constexpr std::array<const char*, 3> kOfCompositions = {"--max-compositions", "--max-composition-parts",
                                                        "--max-composition-depth"};

constexpr int64_t kLongestWait = 3'600'000'000;  // an hour, in microseconds

void declare_compositions(CLI::App& app, torchgraft::AdapterPoolOptions& pool) {
  add_number(app, "--max-compositions", pool.max_compositions,
             "compositions that the module holds at once, also those that stand in requests; 0: none", 0);
  add_number(app, "--max-composition-parts", pool.max_composition_parts, "adapters in a composition", 1);
  add_number(app, "--max-composition-depth", pool.max_composition_depth, "blocks one in another", 1);
}

void declare_serving(CLI::App& app, Options& options) {
  app.option_defaults()->always_capture_default();  // --help shows them
  app.add_option("MODEL.pt", options.model, "a TorchScript text encoder, or a decoder with caches, grafted or not")
      ->required();
  app.add_option("--adapters", options.adapters,
                 "folder of adapter directories, one for each name; a grafted model has adapters without one")
      ->check(CLI::ExistingDirectory);
  app.add_option("--package", options.package,
                 "an AOTInductor package of MODEL.pt (torchgraft export --pool): it runs instead; its code runs")
      ->check(CLI::ExistingFile);
  app.add_option(
         "--library", options.libraries,
         "a library with operators that the model uses besides torch's; its code runs. Several times, if need be")
      ->allow_extra_args(false)  // else it takes MODEL.pt behind it, too
      ->default_str("")
      ->check(CLI::ExistingFile);
  app.add_option("--address", options.address, "IPv4 address to listen on");
  add_number(app, "--port", options.port, "0: any free port");
  add_number(app, "--capacity", options.pool.capacity, "adapters in memory at once", 1);
  declare_compositions(app, options.pool);
  add_number(app, "--max-adapter-bytes", options.pool.max_row_bytes,
             "memory that one adapter may take; the pool takes as much for each of --capacity", 1);
  add_number(app, "--max-adapter-file-bytes", options.adapter_file_bytes, "of an adapter's file of weights", 1);
  add_number(app, "--max-adapter-wait-ms", options.adapter_wait_ms,
             "milliseconds that a request waits for others to end when they use all of --capacity; then it gets 503", 0,
             kLongestWait / 1000);
  app.add_option("--gate-pooling", options.pool.graft.gate_pooling,
                 "over which tokens gates are means, whatever the adapters were trained with; an answer of \"all\" "
                 "depends on its batch's padding (default: as each adapter's directory says; all for AdapterHub's)")
      ->check(CLI::IsMember({"unpadded", "all"}));
  add_number(app, "--threads", options.threads, "threads for each forward pass (libtorch's default)", 1)
      ->default_str("");
  add_quantized_engine(app);
  add_number(app, "--workers", options.service.workers, "forward passes at once", 1, 64);
  add_number(app, "--max-batch", options.service.batch.rows, "rows in a batch", 1);
  add_number(app, "--max-batch-tokens", options.service.batch.tokens,
             "tokens in a batch, padding included; a single request may have more", 1);
  add_number(app, "--max-wait-us", options.wait_us, "microseconds that a request waits for others to share its batch",
             0, kLongestWait);
  add_number(app, "--max-queue", options.service.batch.queued_rows,
             "rows that may wait, at least --max-batch; more get 503", 1);
  add_number(app, "--max-tokens", options.service.tokens, "tokens in a row, with those that are written behind it", 1);
  add_number(app, "--vocabulary", options.service.vocabulary,
             "tokens that the model knows, if its graph does not show it", 1)
      ->default_str("");
  add_number(app, "--pad-id", options.service.pad_id, "the token behind the end of shorter rows", 0);
  add_number(app, "--max-body", options.http.body_bytes, "bytes of a request", 1);
  add_number(app, "--max-unfinished-bytes", options.http.unfinished_bytes,
             "of all requests together whose ends have not come; more get 503", 1);
  add_number(app, "--max-connections", options.http.connections, "fewer where the limit of open files is lower", 1);
  add_number(app, "--idle-seconds", options.http.idle_seconds, "after which the server closes a silent connection", 1);
  add_number(app, "--drain-seconds", options.drain_seconds,
             "how long SIGTERM waits for requests under way; those that still wait then get 503");
}

void declare_generation(CLI::App& app, Options& options) {
  DecoderForm& form = options.form;
  const std::string shown = " (default: as the graph shows)";
  add_number(app, "--heads", form.heads, "of a decoder: heads of keys and values" + shown, 1, kMostHeads)
      ->default_str("");
  add_number(app, "--head-size", form.head_size, "of a decoder: the size of each head" + shown, 1, kLargestHead)
      ->default_str("");
  add_number(app, "--layers", form.layers, "of a decoder: the length of a cache that is a list" + shown, 1, kMostLayers)
      ->default_str("");
  add_number(
      app, "--max-positions", form.max_positions,
      "of a decoder: how many tokens the model has positions for (default: as the graph shows where forward takes "
      "positions; else what has more fails)",
      1)
      ->default_str("");
  app.add_flag("--mask-of-tokens", form.mask_of_tokens,
               "of a decoder: the mask is [batch, tokens], 1 for real ones (else [batch, 1, queries, tokens], added to "
               "the scores)");
  add_number(app, "--max-cache-bytes", options.generate.cache_bytes,
             "of keys and values of all sequences that run, with the copy that a step makes; others wait", 1);
}

// oneDNN's dynamic products, as torch 2.13 calls them, keep the scale of their input in the packed weight: of passes at
// once, one would read the scale of another.
void check_engine(const Options& options) {
  if (at::globalContext().qEngine() == at::kONEDNN && options.service.workers > 1) {
    throw CLI::ValidationError("--quantized-engine",
                               "onednn computes wrong numbers when passes run at once: expected "
                               "--workers 1, got " +
                                   std::to_string(options.service.workers));
  }
}

}  // namespace

void declare(CLI::App& app, Options& options) {
  declare_serving(app, options);
  declare_generation(app, options);
}

void note_given(const CLI::App& app, Options& options) {
  const auto note = [&](const char* name) {
    if (app.count(name) > 0) {
      options.given.emplace_back(name);
    }
  };
  std::for_each(kOfDecoders.begin(), kOfDecoders.end(), note);
  std::for_each(kOfEncoders.begin(), kOfEncoders.end(), note);
  for (const char* name : kOfCompositions) {
    if (!options.package.empty() && app.count(name) > 0) {
      throw CLI::ValidationError(name, "a package runs no compositions: leave this out, or --package");
    }
  }
  options.has_capacity = app.count("--capacity") > 0;
}

void check(const Options& options) {
  check_engine(options);
  const BatchLimits& batch = options.service.batch;
  if (batch.queued_rows < batch.rows) {
    throw CLI::ValidationError("--max-queue", "expected at least --max-batch, " + std::to_string(batch.rows) +
                                                  ", as one request may have that many rows, got " +
                                                  std::to_string(batch.queued_rows));
  }
}

void check_given(const Options& options, bool is_decoder) {
  for (const std::string& name : options.given) {
    const bool is_of_decoders = std::find(kOfDecoders.begin(), kOfDecoders.end(), name) != kOfDecoders.end();
    if (is_of_decoders != is_decoder) {
      throw CLI::ValidationError(name, is_decoder ? "the model is a decoder: this has a meaning for encoders only"
                                                  : "the model is an encoder of texts: its forward takes no cache");
    }
  }
}
