// An HTTP server for one base model and any number of adapters, without Python: libtorch, libtorchgraft.so and
// libtorchgraft_patch.so.

#include "adapter_store.h"
#include "http_server.h"
#include "routes.h"
#include "service.h"

#include <ATen/Parallel.h>
#include <torch/script.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <csignal>
#include <iostream>
#include <string>
#include <thread>
#include <utility>

namespace {

struct Options {
  std::string model;
  std::string adapters;
  std::string address = "127.0.0.1";
  uint16_t port = 8080;
  int64_t capacity = 64;
  std::string gate_pooling = "unpadded";
  int threads = 0;
  int64_t wait_us = 2000;
  unsigned drain_seconds = 30;
  ServiceOptions service;
  HttpLimits http;
};

void declare(CLI::App& app, Options& options) {
  app.add_option("MODEL.pt", options.model, "a TorchScript text encoder, grafted or not")->required();
  app.add_option("--adapters", options.adapters, "folder of adapter directories, one for each name")
      ->required()
      ->check(CLI::ExistingDirectory);
  app.add_option("--address", options.address, "IPv4 address to listen on")->capture_default_str();
  app.add_option("--port", options.port, "0: one that is free")->capture_default_str();
  app.add_option("--capacity", options.capacity, "adapters in memory at once")->check(CLI::PositiveNumber);
  app.add_option("--gate-pooling", options.gate_pooling, "of a model that is not grafted yet")
      ->check(CLI::IsMember({"unpadded", "all"}))
      ->capture_default_str();
  app.add_option("--threads", options.threads, "threads for each forward pass (libtorch's default)")
      ->check(CLI::PositiveNumber);
  app.add_option("--workers", options.service.workers, "forward passes at once")->check(CLI::Range(1, 64));
  app.add_option("--max-batch", options.service.batch.rows, "rows of a batch")->check(CLI::PositiveNumber);
  app.add_option("--max-wait-us", options.wait_us, "how long a request waits for company, in microseconds")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--max-queue", options.service.batch.queued_rows, "rows that wait; more are refused with 503")
      ->check(CLI::PositiveNumber);
  app.add_option("--max-tokens", options.service.tokens, "tokens of a row")->check(CLI::PositiveNumber);
  app.add_option("--pad-id", options.service.pad_id, "the token behind the end of shorter rows");
  app.add_option("--max-body", options.http.body_bytes, "bytes of a request")->check(CLI::PositiveNumber);
  app.add_option("--max-connections", options.http.connections)->check(CLI::PositiveNumber);
  app.add_option("--idle-seconds", options.http.idle_seconds, "after which a silent connection is closed")
      ->check(CLI::PositiveNumber);
  app.add_option("--drain-seconds", options.drain_seconds, "how long SIGTERM waits for requests under way");
}

// Blocks them in this thread and in all that it starts, for sigwait.
sigset_t block_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  return signals;
}

// Until nothing has been under way for a moment, in which a client may use a connection that is still open.
void drain(const HttpServer& http, unsigned seconds) {
  const auto pause = std::chrono::milliseconds(10);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  for (int quiet = 0; quiet < 50 && std::chrono::steady_clock::now() < deadline;) {
    quiet = http.in_flight() == 0 ? quiet + 1 : 0;
    std::this_thread::sleep_for(pause);
  }
}

torch::jit::Module load(const std::string& path) {
  torch::jit::Module module = torch::jit::load(path, torch::kCPU);
  module.eval();
  return module;
}

void serve(const Options& options) {
  const sigset_t signals = block_signals();
  if (options.threads > 0) {
    at::set_num_threads(options.threads);
  }
  const torch::jit::Module module = load(options.model);
  AdapterStore store(module, options.adapters, options.capacity, options.gate_pooling);
  ServiceOptions service_options = options.service;
  service_options.batch.wait = std::chrono::microseconds(options.wait_us);
  service_options.batch.tokens = service_options.batch.rows * service_options.tokens;
  Service service(store, module, service_options);
  Routes routes(service);
  HttpServer http(options.address, options.port, options.http,
                  [&](const HttpRequest& request, Respond respond) { routes.handle(request, std::move(respond)); });
  std::cout << "listening on " << options.address << ":" << http.port() << std::endl;

  int signal = 0;
  sigwait(&signals, &signal);
  std::cout << "draining" << std::endl;
  routes.set_draining();
  http.stop_accepting();
  drain(http, options.drain_seconds);
  service.stop();
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Serves a TorchScript text encoder with many adapters over HTTP.", "server");
  Options options;
  declare(app, options);
  try {
    app.parse(argc, argv);
    serve(options);
    return 0;
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  } catch (const c10::Error& error) {
    std::cerr << "server: " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "server: " << error.what() << "\n";
  }
  return 1;
}
