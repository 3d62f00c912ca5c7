#pragma once

#include "adapter_store.h"
#include "background.h"
#include "metrics.h"
#include "request_error.h"

#include <torchgraft/patch/adapter_pool.h>

#include <atomic>
#include <cstddef>
#include <functional>
#include <string>

// Requests that wait for an adapter.
class AdapterFetches {
 public:
  struct Request {
    std::string adapter;
    size_t rows = 1;
    std::function<bool()> is_gone;  // whether nobody waits for it any more; may be null
    std::function<void(torchgraft::AdapterPool::Lease lease)> on_lease;
    std::function<void(const RequestError* error)> on_fault;  // null: it is gone
  };

  // What it gets must outlive it, and `background` must be stopped before.
  AdapterFetches(AdapterStore& store, Background& background, Metrics& metrics)
      : store_(store), background_(background), metrics_(metrics) {}

  // Calls on_lease at once when the adapter is in memory; else another thread calls on_lease or on_fault when it has
  // been read. Throws RequestError for an unknown name, and 503 when the adapter must be read and there is no `room`.
  void fetch(Request request, bool room);

  size_t waiting_rows() const { return waiting_rows_; }

 private:
  void read(const Request& request);

  AdapterStore& store_;
  Background& background_;
  Metrics& metrics_;
  std::atomic<size_t> waiting_rows_{0};
};
