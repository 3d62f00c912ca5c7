#include "routes.h"

#include "generate_reply.h"
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

std::string gauge(const std::string& name, const std::string& help, double value) {
  return metric_text(name, "gauge", help, value);
}

std::string counter(const std::string& name, const std::string& help, double value) {
  return metric_text(name, "counter", help, value);
}

std::string prediction_metrics(const Metrics& metrics, const Service& service) {
  return metrics.seconds.text("torchgraft_predict_seconds", "Time from request to answer.") +
         gauge("torchgraft_queue_rows", "Rows that wait for a batch, or for their adapter.",
               static_cast<double>(service.queued_rows()));
}

std::string generation_metrics(const Metrics& metrics, const GenerateService& service) {
  return metrics.generate_seconds.text("torchgraft_generate_seconds", "Time from request to last token.") +
         metrics.sequences.text("torchgraft_sequences_total", "end", "Sequences by how they ended.") +
         counter("torchgraft_prompt_tokens_total", "Tokens read.", static_cast<double>(metrics.prompt_tokens)) +
         counter("torchgraft_generated_tokens_total", "Tokens written.",
                 static_cast<double>(metrics.generated_tokens)) +
         gauge("torchgraft_sequences_running", "Sequences that run.", static_cast<double>(service.running())) +
         gauge("torchgraft_sequences_waiting", "Sequences that wait for room, or for their adapter.",
               static_cast<double>(service.waiting())) +
         gauge("torchgraft_cache_bytes", "Memory of keys and values, padding included.",
               static_cast<double>(service.cache_bytes()));
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
    services_.metrics.responses.add(std::to_string(response.status));
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
  if (path == "/v1/predict" && services_.predictions) {
    expect_method(request, "POST");
    predict(request, respond);
  } else if (path == "/v1/generate" && services_.generations) {
    expect_method(request, "POST");
    generate(request, respond);
  } else if (path == kAdapters) {
    expect_method(request, "GET");
    services_.background.look(answering(respond, [this] { return list(); }));
  } else if (path.starts_with(std::string(kAdapters) + "/")) {
    adapters(request, path.substr(std::string(kAdapters).size() + 1), respond);
  } else if (path == "/healthz") {
    expect_method(request, "GET");
    respond(draining_ ? error_response(503, "draining") : answer({{"status", "ok"}}));
  } else if (path == "/metrics") {
    expect_method(request, "GET");
    respond(metrics());
  } else if (path == "/v1/predict") {
    throw RequestError(404, "the model of this server is a decoder: POST /v1/generate");
  } else if (path == "/v1/generate") {
    throw RequestError(404, "the model of this server is no decoder with caches: POST /v1/predict");
  } else {
    throw RequestError(404, "nothing is at " + path);
  }
}

void Routes::predict(const HttpRequest& request, const Respond& respond) {
  const auto start = std::chrono::steady_clock::now();
  PredictRequest body = parse_predict(request.body);
  services_.predictions->predict(
      body.adapter, std::move(body.rows), body.pooling,
      [this, start, adapter = body.adapter, respond](const Service::Prediction& prediction, const RequestError* error) {
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        if (!error || error->status != 404) {  // nothing was predicted
          services_.metrics.seconds.observe(seconds.count());
        }
        respond(error ? error_response(error->status, error->what())
                      : HttpResponse{200, predict_text(adapter, prediction)});
      });
}

void Routes::generate(const HttpRequest& request, const Respond& respond) {
  const auto start = std::chrono::steady_clock::now();
  GenerateRequest body = parse_generate(request.body);
  request.client->watch();
  const auto reply = std::make_shared<GenerateReply>(body.adapter, body.stream, respond);
  services_.generations->generate(std::move(body), {[client = request.client] { return client->is_gone(); },
                                                    [reply](int64_t token) { reply->add(token); },
                                                    [this, start, reply](SequenceEnd end, const RequestError* error) {
                                                      const std::chrono::duration<double> seconds =
                                                          std::chrono::steady_clock::now() - start;
                                                      services_.metrics.generate_seconds.observe(seconds.count());
                                                      reply->end(end, error);
                                                    }});
}

// Reads and lists files in other threads: a file system may not answer for long.
void Routes::adapters(const HttpRequest& request, const std::string& name, const Respond& respond) {
  AdapterStore& store = services_.store;
  if (request.method == "GET") {
    services_.background.look(answering(respond, [&store, name] {
      return answer({{"name", name}, {"config", torchgraft::parse_json(store.config(name), name)}});
    }));
  } else if (request.method == "DELETE") {
    services_.background.look(answering(respond, [&store, name] {
      store.remove(name);
      return answer({{"name", name}, {"removed", true}});
    }));
  } else if (request.method == "PUT") {
    services_.background.run(answering(respond, [&store, name] {
      store.load(name);
      return answer({{"name", name}, {"resident", true}});
    }));
  } else {
    throw RequestError(405, request.path + ": expected GET, PUT or DELETE, got " + request.method);
  }
}

HttpResponse Routes::list() const {
  json adapters = json::array();
  for (const AdapterStore::Info& info : services_.store.list()) {
    adapters.push_back({{"name", info.name}, {"resident", info.resident}});
  }
  return answer({{"adapters", adapters}});
}

HttpResponse Routes::metrics() const {
  const Metrics& metrics = services_.metrics;
  const auto stats = services_.store.stats();
  std::string text = services_.predictions ? prediction_metrics(metrics, *services_.predictions)
                                           : generation_metrics(metrics, *services_.generations);
  text += metrics.batch_rows.text("torchgraft_batch_rows", "Rows of a forward pass.");
  text += metrics.responses.text("torchgraft_responses_total", "status", "Answers by status.");
  text += metrics.adapter_requests.text("torchgraft_adapter_requests_total", "adapter", "Requests by adapter.");
  text += gauge("torchgraft_adapter_rows", "Adapters that fit in memory.", static_cast<double>(stats.capacity));
  text += gauge("torchgraft_resident_adapters", "Adapters in memory.", static_cast<double>(stats.resident));
  text += gauge("torchgraft_compositions", "Compositions in the module.", static_cast<double>(stats.compositions));
  text += gauge("torchgraft_adapter_row_bytes", "Memory of one adapter.", static_cast<double>(stats.row_bytes));
  text += gauge("torchgraft_adapter_bytes", "Memory of all rows.", static_cast<double>(stats.bank_bytes));
  text += counter("torchgraft_adapter_loads_total", "Adapters brought into memory.", static_cast<double>(stats.loads));
  text += counter("torchgraft_adapter_evictions_total", "Adapters that left for others.",
                  static_cast<double>(stats.evictions));
  text += counter("torchgraft_bank_rebuilds_total", "Times that the banks had to grow.",
                  static_cast<double>(stats.rebuilds));
  text += gauge("process_resident_memory_bytes", "Memory of the process.", static_cast<double>(resident_memory()));
  return {200, text, "text/plain; version=0.0.4"};
}
