#include "routes.h"

#include "predict_request.h"

#include <torchgraft/registration/error_text.h>
#include <torchgraft/registration/parse_json.h>

#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

namespace {

using nlohmann::json;

constexpr const char* kAdapters = "/v1/adapters";

// The shortest text that reads back as the same float; null for infinities and NaN, which JSON does not have.
void append_number(std::string& text, float value) {
  std::array<char, 32> buffer;
  if (!std::isfinite(value)) {
    text += "null";
    return;
  }
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value).ptr;
  text.append(buffer.data(), end);
}

void append_output(std::string& text, const Output& output) {
  const auto line = static_cast<size_t>(output.columns);
  text += line > 0 ? "[[" : "[";
  for (size_t i = 0; i < output.values.size(); ++i) {
    text += i == 0 ? "" : line > 0 && i % line == 0 ? "],[" : ",";
    append_number(text, output.values[i]);
  }
  text += line > 0 ? "]]" : "]";
}

std::string predict_text(const std::string& adapter, const Service::Prediction& prediction) {
  std::string text = R"({"adapter":)" + (adapter.empty() ? "null" : json(adapter).dump());
  if (!prediction.labels.empty()) {
    text += R"(,"labels":)" + json(prediction.labels).dump(-1, ' ', false, json::error_handler_t::replace);
  }
  text += prediction.is_logits ? R"(,"logits":[)" : R"(,"outputs":[)";
  for (size_t row = 0; row < prediction.outputs.size(); ++row) {
    text += row == 0 ? "" : ",";
    append_output(text, prediction.outputs[row]);
  }
  return text + "]}";
}

HttpResponse answer(const json& body) { return {200, body.dump()}; }

void expect_method(const HttpRequest& request, const std::string& allowed) {
  const bool is_head = request.method == "HEAD" && allowed == "GET";  // the same without its text
  if (request.method != allowed && !is_head) {
    throw RequestError(405, request.path + ": expected " + allowed + ", got " + request.method);
  }
}

// A job that responds with what `make` returns, or with what it throws.
std::function<void()> answering(const Respond& respond, std::function<HttpResponse()> make) {
  return [respond, make = std::move(make)] {
    try {
      respond(make());
    } catch (const RequestError& error) {
      respond(error_response(error.status, error.what()));
    } catch (const std::exception& error) {
      respond(error_response(500, torchgraft::one_line(error)));
    }
  };
}

}  // namespace

void Routes::handle(const HttpRequest& request, Respond respond) {
  const auto counted = [this, respond = std::move(respond)](HttpResponse response) {
    service_.metrics().responses.add(std::to_string(response.status));
    respond(std::move(response));
  };
  try {
    dispatch(request, counted);
  } catch (const RequestError& error) {
    counted(error_response(error.status, error.what()));
  }
}

void Routes::dispatch(const HttpRequest& request, const Respond& respond) {
  const std::string& path = request.path;
  if (path == "/v1/predict") {
    expect_method(request, "POST");
    predict(request, respond);
  } else if (path == kAdapters) {
    expect_method(request, "GET");
    service_.beside(answering(respond, [this] { return list(); }));
  } else if (path.starts_with(std::string(kAdapters) + "/")) {
    adapters(request, path.substr(std::string(kAdapters).size() + 1), respond);
  } else if (path == "/healthz") {
    expect_method(request, "GET");
    respond(draining_ ? error_response(503, "draining") : answer({{"status", "ok"}}));
  } else if (path == "/metrics") {
    expect_method(request, "GET");
    respond(metrics());
  } else {
    throw RequestError(404, "nothing is at " + path);
  }
}

void Routes::predict(const HttpRequest& request, const Respond& respond) {
  const auto start = std::chrono::steady_clock::now();
  PredictRequest body = parse_predict(request.body);
  service_.predict(
      body.adapter, std::move(body.rows), body.pooling,
      [this, start, adapter = body.adapter, respond](const Service::Prediction& prediction, const RequestError* error) {
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        if (!error || error->status != 404) {  // nothing was predicted
          service_.metrics().seconds.observe(seconds.count());
        }
        respond(error ? error_response(error->status, error->what())
                      : HttpResponse{200, predict_text(adapter, prediction)});
      });
}

// Reads and lists files in other threads: a file system may not answer for long.
void Routes::adapters(const HttpRequest& request, const std::string& name, const Respond& respond) {
  AdapterStore& store = service_.store();
  if (request.method == "GET") {
    service_.beside(answering(respond, [&store, name] {
      return answer({{"name", name}, {"config", torchgraft::parse_json(store.config(name), name)}});
    }));
  } else if (request.method == "DELETE") {
    service_.beside(answering(respond, [&store, name] {
      store.remove(name);
      return answer({{"name", name}, {"removed", true}});
    }));
  } else if (request.method == "PUT") {
    service_.in_background(answering(respond, [&store, name] {
      store.load(name);
      return answer({{"name", name}, {"resident", true}});
    }));
  } else {
    throw RequestError(405, request.path + ": expected GET, PUT or DELETE, got " + request.method);
  }
}

HttpResponse Routes::list() const {
  json adapters = json::array();
  for (const AdapterStore::Info& info : service_.store().list()) {
    adapters.push_back({{"name", info.name}, {"resident", info.resident}});
  }
  return answer({{"adapters", adapters}});
}

HttpResponse Routes::metrics() const {
  const Metrics& metrics = service_.metrics();
  const auto stats = service_.store().stats();
  const auto gauge = [](const std::string& name, const std::string& help, auto value) {
    return metric_text(name, "gauge", help, static_cast<double>(value));
  };
  const auto counter = [](const std::string& name, const std::string& help, auto value) {
    return metric_text(name, "counter", help, static_cast<double>(value));
  };
  std::string text = metrics.seconds.text("torchgraft_predict_seconds", "Time from request to answer.");
  text += metrics.batch_rows.text("torchgraft_batch_rows", "Rows of a forward pass.");
  text += metrics.responses.text("torchgraft_responses_total", "status", "Answers by status.");
  text += metrics.adapter_requests.text("torchgraft_adapter_requests_total", "adapter", "Predictions by adapter.");
  text += gauge("torchgraft_queue_rows", "Rows that wait for a batch, or for their adapter.", service_.queued_rows());
  text += gauge("torchgraft_adapter_rows", "Adapters that fit in memory.", stats.capacity);
  text += gauge("torchgraft_resident_adapters", "Adapters in memory.", stats.resident);
  text += gauge("torchgraft_adapter_row_bytes", "Memory of one adapter.", stats.row_bytes);
  text += gauge("torchgraft_adapter_bytes", "Memory of all rows.", stats.bank_bytes);
  text += counter("torchgraft_adapter_loads_total", "Adapters brought into memory.", stats.loads);
  text += counter("torchgraft_adapter_evictions_total", "Adapters that left for others.", stats.evictions);
  text += counter("torchgraft_bank_rebuilds_total", "Times that the banks had to grow.", stats.rebuilds);
  text += gauge("process_resident_memory_bytes", "Memory of the process.", resident_memory());
  return {200, text, "text/plain; version=0.0.4"};
}
