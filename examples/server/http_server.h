#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

struct MHD_Connection;
struct MHD_Daemon;

struct HttpRequest {
  std::string method;
  std::string path;  // without the query
  std::string body;
};

struct HttpResponse {
  int status = 200;
  std::string body;
  std::string content_type = "application/json";
};

// {"error": {"status": ..., "message": ...}}
HttpResponse error_response(int status, const std::string& message);

struct HttpLimits {
  size_t body_bytes = 4 << 20;
  size_t header_bytes = 32 << 10;  // of a connection's headers, and of the answer's
  int headers = 64;
  unsigned connections = 4096;
  unsigned idle_seconds = 30;  // a connection on which nothing happens is closed
};

// Answers a request, once, from any thread. One that is never answered is answered when its last owner goes: with 500,
// or with 503 once the server has stopped accepting.
using Respond = std::function<void(HttpResponse)>;

// HTTP/1.1 on libmicrohttpd: one thread waits for all connections (epoll), and no connection holds a thread while its
// request is worked on or while it is idle.
class HttpServer {
 public:
  using Handler = std::function<void(HttpRequest, Respond)>;

  // port 0: one that is free. Throws std::runtime_error when it cannot listen. The handler runs on the thread that all
  // connections share: it must not wait for long.
  HttpServer(const std::string& address, uint16_t port, const HttpLimits& limits, Handler handler);
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;
  ~HttpServer();  // closes connections; requests must have been answered

  uint16_t port() const;

  // No new connections; each one that there is is closed after its next answer.
  void stop_accepting();

  // Requests that have been read and whose answers are not yet out.
  int in_flight() const { return in_flight_; }

 private:
  struct Exchange;
  struct Callbacks;

  const HttpLimits limits_;
  const Handler handler_;
  std::atomic<int> in_flight_{0};
  std::atomic<bool> draining_{false};
  MHD_Daemon* daemon_ = nullptr;
};
