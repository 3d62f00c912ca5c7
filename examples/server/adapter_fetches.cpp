#include "adapter_fetches.h"

#include <torchgraft/registration/error_text.h>

#include <exception>
#include <memory>
#include <utility>

void AdapterFetches::fetch(Request request, bool room) {
  if (auto lease = store_.try_acquire(request.adapter)) {
    metrics_.adapter_requests.add(metric_label(request.adapter));
    request.on_lease(std::move(*lease));
    return;
  }
  if (!room) {
    throw RequestError(503, kBusy);
  }
  const size_t rows = request.rows;
  waiting_rows_ += rows;
  // Ends the count when the job is done or dropped.
  const std::shared_ptr<void> waiting(nullptr, [this, rows](void*) { waiting_rows_ -= rows; });
  background_.run([this, request = std::move(request), waiting] { read(request); });
}

void AdapterFetches::read(const Request& request) {
  if (request.is_gone && request.is_gone()) {
    request.on_fault(nullptr);  // its adapter would drive out one that others use
    return;
  }
  try {
    auto lease = store_.acquire(request.adapter);
    metrics_.adapter_requests.add(metric_label(request.adapter));
    request.on_lease(std::move(lease));
  } catch (const RequestError& error) {
    request.on_fault(&error);
  } catch (const std::exception& error) {
    const RequestError failure(500, torchgraft::one_line(error));
    request.on_fault(&failure);
  }
}
