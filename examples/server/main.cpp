// An HTTP server for one base model and any number of adapters, without Python: libtorch, libtorchgraft.so and
// libtorchgraft_patch.so.

#include "adapter_store.h"
#include "background.h"
#include "generate_service.h"
#include "http_server.h"
#include "log.h"
#include "options.h"
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
