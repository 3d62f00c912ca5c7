#pragma once

#include "http_server.h"
#include "request_error.h"
#include "sequence_batcher.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// The answer to one POST /v1/generate: JSON at the end, or an event for each token.
class GenerateReply {
 public:
  // adapter: empty for the base model.
  GenerateReply(std::string adapter, bool is_stream, Respond respond);
  GenerateReply(const GenerateReply&) = delete;
  GenerateReply& operator=(const GenerateReply&) = delete;
  ~GenerateReply();  // ends a stream that nobody has ended with an error

  // One thread calls these.
  void add(int64_t token);
  void end(SequenceEnd end, const RequestError* error);  // does nothing the second time

 private:
  void finish(SequenceEnd end);
  void fail(const RequestError& error);

  const std::string adapter_;
  const bool is_stream_;
  const Respond respond_;
  bool has_ended_ = false;
  std::vector<int64_t> tokens_;         // of an answer that is no stream
  std::shared_ptr<HttpStream> stream_;  // once it has begun
};
