#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

struct MHD_Connection;
struct MHD_Daemon;

// Whoever waits for an answer. Any thread may call it.
class HttpClient {
 public:
  // Only of clients that are watched: whether the client has closed the connection, or its own side of it.
  bool is_gone() const { return is_gone_; }

  // A handler calls it, before it returns: the server then sees the client go.
  void watch() { is_watched_ = true; }

 private:
  friend class HttpServer;
  std::atomic<bool> is_gone_{false};
  std::atomic<bool> is_watched_{false};
};

struct HttpRequest {
  std::string method;
  std::string path;  // without the query
  std::string body;
  std::shared_ptr<HttpClient> client;
};

// The body of an answer that is written bit by bit. Any thread may call it. It holds what the client has not taken yet.
class HttpStream {
 public:
  void write(const std::string& text);
  void close();  // the body ends behind what was written

 private:
  friend class HttpServer;
  void wake_reader();

  std::mutex mutex_;
  std::string text_;
  bool is_closed_ = false;
  std::function<void()> resume_;  // while the connection waits for text
};

struct HttpResponse {
  int status = 200;
  std::string body;
  std::string content_type = "application/json";
  std::shared_ptr<HttpStream> stream = nullptr;  // in place of `body`; somebody must close it
};

// {"error": {"status": ..., "message": ...}}
HttpResponse error_response(int status, const std::string& message);

struct HttpLimits {
  size_t body_bytes = 4 << 20;
  size_t unfinished_bytes = 128 << 20;  // of all bodies that have not come to their ends; 503 beyond
  size_t header_bytes = 32 << 10;       // of a request's headers, and of the answer's
  int headers = 64;
  unsigned connections = 4096;
  unsigned idle_seconds = 30;  // after which the server closes a silent connection
};

// Answers a request, once, from any thread. When the last copy goes without an answer, the server answers: with 500, or
// with 503 once it has stopped accepting.
using Respond = std::function<void(HttpResponse)>;

// HTTP/1.1 on libmicrohttpd: one thread waits for all connections (epoll). A connection holds no thread while it is
// idle or while its request is under way. The thread's loop is here: that of libmicrohttpd 0.9.75 waits for events a
// second time when epoll_wait() returned exactly as many as it had room for, and all connections stall until another
// event comes. Only this thread calls libmicrohttpd.
class HttpServer {
 public:
  using Handler = std::function<void(HttpRequest, Respond)>;

  // port 0: any free port. Throws std::runtime_error when it cannot listen. The handler runs on the thread that all
  // connections share, so it must not wait for long.
  HttpServer(const std::string& address, uint16_t port, const HttpLimits& limits, Handler handler);
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;
  ~HttpServer();  // closes connections; all requests must have their answers

  uint16_t port() const { return port_; }

  // Accepts no new connections, and closes each open one after its next answer.
  void stop_accepting();

  // Requests that the server has read and not yet answered.
  int in_flight() const { return in_flight_; }

 private:
  struct Exchange;
  struct Callbacks;

  void serve();
  void wait_for_events() const;
  void wake() const;
  void resume_answered();
  void resume_later(Exchange& exchange);
  void watch(Exchange& exchange) const;
  void find_gone() const;

  const HttpLimits limits_;
  const Handler handler_;
  std::atomic<int> in_flight_{0};
  std::atomic<bool> draining_{false};
  std::atomic<bool> ending_{false};
  size_t unfinished_ = 0;  // bytes
  MHD_Daemon* daemon_ = nullptr;
  int events_ = -1;  // libmicrohttpd's epoll
  int wake_ = -1;    // an eventfd
  int gone_ = -1;    // an epoll of watched clients' connections
  uint16_t port_ = 0;
  std::mutex mutex_;
  std::vector<Exchange*> answered_;  // whose connections wait for the loop to go on with them
  std::thread thread_;
};
