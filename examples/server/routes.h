#pragma once

#include "http_server.h"
#include "service.h"

// The server's addresses:
//   POST   /v1/predict          {"adapter": name or null, "input_ids": [[...]], "pooling": "first" or "mean"}
//                               -> {"adapter": ..., "outputs": [[...]]}; without "pooling", of an adapter with a
//                               head, {"adapter": ..., "labels": [...], "logits": [[...]]}
//   GET    /v1/adapters         -> {"adapters": [{"name": ..., "resident": ...}]}
//   GET    /v1/adapters/<name>  -> {"name": ..., "config": ...}
//   PUT    /v1/adapters/<name>  reads it from the folder, even if it is in memory
//   DELETE /v1/adapters/<name>  stops serving it until the next PUT; its files stay
//   GET    /healthz, /metrics
class Routes {
 public:
  explicit Routes(Service& service) : service_(service) {}

  // Waits neither for adapters nor for forward passes nor for the file system. Calls `respond` now or later, from any
  // thread.
  void handle(const HttpRequest& request, Respond respond);

  // From now on /healthz says that the server is about to end.
  void set_draining() { draining_ = true; }

 private:
  void dispatch(const HttpRequest& request, const Respond& respond);
  void predict(const HttpRequest& request, const Respond& respond);
  void adapters(const HttpRequest& request, const std::string& name, const Respond& respond);
  HttpResponse list() const;
  HttpResponse metrics() const;

  Service& service_;
  std::atomic<bool> draining_{false};
};
