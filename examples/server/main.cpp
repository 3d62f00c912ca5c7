// An HTTP server for one base model and any number of adapters, without Python: libtorch, libtorchgraft.so and
// libtorchgraft_patch.so.

#include "../number_option.h"
#include "../quantized_engine.h"
#include "adapter_store.h"
#include "background.h"
#include "generate_service.h"
#include "http_server.h"
#include "log.h"
#include "package_check.h"
#include "routes.h"
#include "service.h"

#include <torchgraft/patch/forward_inputs.h>
#include <torchgraft/patch/load_module.h>
#include <torchgraft/registration/error_text.h>

#include <ATen/DynamicLibrary.h>
#include <ATen/Parallel.h>
#include <sys/resource.h>
#include <torch/script.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

struct Options {
  std::string model;
  std::string package;
  std::string adapters;
  std::vector<std::string> libraries;
  std::string address = "127.0.0.1";
  uint16_t port = 8080;
  torchgraft::AdapterPoolOptions pool;
  bool has_capacity = false;
  uint64_t adapter_file_bytes = uint64_t{1} << 30;
  int threads = 0;
  int64_t wait_us = 2000;
  int64_t adapter_wait_ms = 30'000;
  unsigned drain_seconds = 30;
  ServiceOptions service;
  DecoderForm form;
  GenerateOptions generate;
  HttpLimits http;
  std::vector<std::string> given;  // options that have a meaning for one kind of model only
};

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

void declare(CLI::App& app, Options& options) {
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

void check(const Options& options) {
  check_engine(options);
  const BatchLimits& batch = options.service.batch;
  if (batch.queued_rows < batch.rows) {
    throw CLI::ValidationError("--max-queue", "expected at least --max-batch, " + std::to_string(batch.rows) +
                                                  ", as one request may have that many rows, got " +
                                                  std::to_string(batch.queued_rows));
  }
}

// Raises the limit of open files for `wanted` connections. Returns how many fit, with files left for adapters.
unsigned connections_within_limits(unsigned wanted) {
  constexpr rlim_t kOtherFiles = 64;
  rlimit files = {};
  getrlimit(RLIMIT_NOFILE, &files);
  const rlim_t needed = wanted + kOtherFiles;
  if (files.rlim_cur < needed) {
    files.rlim_cur = std::min(needed, files.rlim_max);
    setrlimit(RLIMIT_NOFILE, &files);
    getrlimit(RLIMIT_NOFILE, &files);
  }
  if (files.rlim_cur >= needed) {
    return wanted;
  }
  if (files.rlim_cur <= kOtherFiles) {
    throw std::runtime_error("expected a limit of open files above " + std::to_string(kOtherFiles) + ", got " +
                             std::to_string(files.rlim_cur));
  }
  const auto fitting = static_cast<unsigned>(files.rlim_cur - kOtherFiles);
  log_line("server: " + std::to_string(fitting) + " connections at most: " + std::to_string(files.rlim_cur) +
           " files may be open");
  return fitting;
}

// Blocks SIGTERM and SIGINT for sigwait(), in this thread and in those that it starts.
sigset_t block_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  return signals;
}

// Waits until no request has been under way for `quiet`, but no longer than `most`.
void wait_until_idle(const HttpServer& http, std::chrono::milliseconds quiet, std::chrono::seconds most) {
  using std::chrono::steady_clock;
  const auto deadline = steady_clock::now() + most;
  auto busy = steady_clock::now();
  while (steady_clock::now() < deadline) {
    if (http.in_flight() > 0) {
      busy = steady_clock::now();
    } else if (steady_clock::now() - busy >= quiet) {
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

// What draining may take beyond its seconds: for forward passes that run, and for adapters that are being read.
constexpr std::chrono::seconds kGrace(5);

// Ends the process then, whatever it waits for: a file system may not answer any more.
void end_after(std::chrono::seconds time) {
  std::thread([time] {
    std::this_thread::sleep_for(time);
    log_line("server: gave up waiting for what is under way");
    std::_Exit(1);
  }).detach();
}

// What the server serves: texts that an encoder reads, or texts that a decoder writes.
struct Served {
  std::optional<Service> predictions;
  std::optional<GenerateService> generations;

  void stop() {
    if (predictions) {
      predictions->stop();
    }
    if (generations) {
      generations->stop();
    }
  }
};

// nullopt: the model reads texts. An encoder needs nothing but token ids, masks and types; what needs more is a decoder
// if its layers keep keys and values.
std::optional<DecoderForm> decoder_form(const torch::jit::Module& module, const DecoderForm& given) {
  try {
    const torchgraft::ForwardInputs inputs(module);
  } catch (const c10::Error&) {
    if (auto form = find_decoder_form(module, given)) {
      return form;
    }
    throw;
  }
  return std::nullopt;
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

// The services in `served` hold rows that background jobs wait for: they end first.
class Ending {
 public:
  Ending(Served& served, Background& background) : served_(served), background_(background) {}
  Ending(const Ending&) = delete;
  Ending& operator=(const Ending&) = delete;
  ~Ending() { stop(); }
  void stop() {
    served_.stop();
    background_.stop();
  }

 private:
  Served& served_;
  Background& background_;
};

GenerateOptions generate_options(const Options& options) {
  GenerateOptions result = options.generate;
  result.limits.rows = options.service.batch.rows;
  result.limits.waiting = options.service.batch.queued_rows;
  result.limits.prompt_tokens = static_cast<int64_t>(options.service.batch.tokens);
  result.tokens = static_cast<int64_t>(options.service.tokens);
  result.vocabulary = options.service.vocabulary;
  return result;
}

torch::jit::Module load(const std::string& path) {
  torch::jit::Module module = torchgraft::load_module(path);
  module.eval();
  return module;
}

void serve(const Options& options) {
  check(options);
  const sigset_t signals = block_signals();
  if (options.threads > 0) {
    at::set_num_threads(options.threads);
  }
  for (const std::string& library : options.libraries) {
    // With a slash, dlopen() takes it for a path. Never unloaded: its operators stay registered.
    const std::string path = library.find('/') == std::string::npos ? "./" + library : library;
    const at::DynamicLibrary loaded(path.c_str(), nullptr, /*leak_handle=*/true);
  }
  const torch::jit::Module module = load(options.model);
  if (options.adapters.empty() && !is_grafted(module)) {
    throw CLI::ValidationError("--adapters", options.model + " has no adapters; give the folder of some");
  }
  const std::optional<DecoderForm> form = decoder_form(module, options.form);
  check_given(options, form.has_value());
  torchgraft::AdapterPoolOptions pool = options.pool;
  pool.longest_wait = std::chrono::milliseconds(options.adapter_wait_ms);
  const std::optional<PackageForm> package_form =
      options.package.empty() ? std::nullopt : std::optional(read_package_form(options.package));
  if (package_form) {
    fit_pool(pool, *package_form, options.has_capacity);
  }
  AdapterStore store(module, options.adapters, pool, options.adapter_file_bytes);
  ServiceOptions service_options = options.service;
  service_options.batch.wait = std::chrono::microseconds(options.wait_us);
  const std::unique_ptr<Package> package =
      package_form ? open_package(options.package, *package_form, store, module, service_options) : nullptr;
  Metrics metrics;
  Background background;
  Served served;
  Ending ending(served, background);
  if (form) {
    served.generations.emplace(store, background, metrics, module, *form, generate_options(options));
  } else {
    served.predictions.emplace(store, background, metrics, module, service_options, package.get());
  }
  Routes routes({store, background, metrics, served.predictions ? &*served.predictions : nullptr,
                 served.generations ? &*served.generations : nullptr});
  HttpLimits limits = options.http;
  limits.connections = connections_within_limits(limits.connections);
  HttpServer http(options.address, options.port, limits,
                  [&](HttpRequest request, Respond respond) { routes.handle(request, std::move(respond)); });
  std::cout << "listening on " << options.address << ":" << http.port() << std::endl;

  int signal = 0;
  sigwait(&signals, &signal);
  pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);  // a second signal ends the process
  std::cout << "draining" << std::endl;
  end_after(std::chrono::seconds(options.drain_seconds) + kGrace);
  routes.set_draining();
  http.stop_accepting();
  // Clients may still use open connections: half a second without a request says that none does.
  wait_until_idle(http, std::chrono::milliseconds(500), std::chrono::seconds(options.drain_seconds));
  ending.stop();
  wait_until_idle(http, std::chrono::milliseconds(0),
                  std::chrono::seconds(2));  // for the answers to what stop() dropped
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Serves a TorchScript text encoder or decoder with many adapters over HTTP.", "server");
  Options options;
  options.pool.max_row_bytes = int64_t{256} << 20;
  declare(app, options);
  declare_generation(app, options);
  try {
    app.parse(argc, argv);
    note_given(app, options);
    serve(options);
    return 0;
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::cerr << "server: " << torchgraft::one_line(error) << " (server --help)\n";
    return 2;
  } catch (const c10::Error& error) {  // all lines: graft() lists what it nearly recognised
    std::cerr << "server: " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "server: " << torchgraft::one_line(error) << "\n";
  }
  return 1;
}
