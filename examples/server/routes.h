#pragma once

#include "generate_service.h"
#include "http_server.h"
#include "service.h"

// The server's addresses:
//   POST   /v1/predict          {"adapter": name or null, "input_ids": [[...]], "pooling": "first" or "mean"}
//                               -> {"adapter": ..., "outputs": [[...]]}; without "pooling", of an adapter with a
//                               head, {"adapter": ..., "labels": [...], "logits": [[...]]}
//   POST   /v1/generate         {"adapter": name or null, "input_ids": [...], "max_new_tokens": ..., "stop": [...],
//   ...}
//                               -> {"adapter": ..., "tokens": [...], "finish_reason": "stop" or "length"}; with
//                               "stream": true server-sent events, {"token": ...} for each and a last
//                               {"finish_reason": ...}
//   GET    /v1/adapters         -> {"adapters": [{"name": ..., "resident": ...}]}
//   GET    /v1/adapters/<name>  -> {"name": ..., "config": ...}
//   PUT    /v1/adapters/<name>  reads it from the folder, even if it is in memory
//   DELETE /v1/adapters/<name>  stops serving it until the next PUT; its files stay
//   GET    /healthz, /metrics
// A model either reads texts or writes them: the other of the two addresses is not there.
class Routes {
 public:
  struct Services {
    AdapterStore& store;
    Background& background;
    Metrics& metrics;
    Service* predictions = nullptr;
    GenerateService* generations = nullptr;
  };

  explicit Routes(const Services& services) : services_(services) {}

  // Waits neither for adapters nor for forward passes nor for the file system. Calls `respond` now or later, from any
  // thread.
  void handle(const HttpRequest& request, Respond respond);

  // From now on /healthz says that the server is about to end.
  void set_draining() { draining_ = true; }

 private:
  void dispatch(const HttpRequest& request, const Respond& respond);
  void predict(const HttpRequest& request, const Respond& respond);
  void generate(const HttpRequest& request, const Respond& respond);
  void adapters(const HttpRequest& request, const std::string& name, const Respond& respond);
  HttpResponse list() const;
  HttpResponse metrics() const;

  const Services services_;
  std::atomic<bool> draining_{false};
};
