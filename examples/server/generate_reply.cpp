#include "generate_reply.h"

#include <nlohmann/json.hpp>

#include <utility>

namespace {

using nlohmann::json;

constexpr int kClientGone = 499;  // as other servers log it; nobody reads the answer

std::string event(const std::string& data) { return "data: " + data + "\n\n"; }

}  // namespace

GenerateReply::GenerateReply(std::string adapter, bool is_stream, Respond respond)
    : adapter_(std::move(adapter)), is_stream_(is_stream), respond_(std::move(respond)) {}

GenerateReply::~GenerateReply() {
  if (!stream_ || has_ended_) {
    return;
  }
  try {
    fail(RequestError(500, "the sequence was given up"));
  } catch (const std::exception&) {  // out of memory: the stream ends without a reason
    stream_->close();
  }
}

void GenerateReply::add(int64_t token) {
  if (!is_stream_) {
    tokens_.push_back(token);
    return;
  }
  if (!stream_) {  // before the first token an error has a status of its own
    stream_ = std::make_shared<HttpStream>();
    respond_({200, "", "text/event-stream", stream_});
  }
  stream_->write(event(json{{"token", token}}.dump()));
}

void GenerateReply::end(SequenceEnd end, const RequestError* error) {
  if (has_ended_) {
    return;
  }
  if (error) {
    fail(*error);
  } else if (end == SequenceEnd::kCancelled) {
    fail(RequestError(kClientGone, "the client has gone"));
  } else {
    finish(end);
  }
  has_ended_ = true;  // else the destructor says that it was given up
}

void GenerateReply::finish(SequenceEnd end) {
  if (stream_) {
    stream_->write(event(json{{"finish_reason", to_string(end)}}.dump()));
    stream_->close();
    return;
  }
  const json adapter = adapter_.empty() ? json() : json(adapter_);
  respond_({200, json{{"adapter", adapter}, {"tokens", tokens_}, {"finish_reason", to_string(end)}}.dump()});
}

void GenerateReply::fail(const RequestError& error) {
  HttpResponse response = error_response(error.status, error.what());
  if (stream_) {
    stream_->write("event: error\n" + event(response.body));
    stream_->close();
  } else {
    respond_(std::move(response));
  }
}
