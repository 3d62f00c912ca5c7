#include "http_server.h"

#include <arpa/inet.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace {

// The server reads a body that is too long to its end and forgets it, so that the client sees the answer instead of a
// reset connection. Beyond this many bytes it stops, so that nobody keeps it reading for ever.
constexpr size_t kMostDiscarded = size_t{1} << 30;

// Leaves the escapes of an address as they are: no name here needs one, and %00 would cut a name short.
size_t no_escapes(void*, MHD_Connection*, char* text) { return std::strlen(text); }

// What a request's headers say of where its body ends.
struct Framing {
  int headers = 0;
  int lengths = 0;
  int encodings = 0;
  std::string fault;  // of a name or a value
};

bool is_token(std::string_view name) {
  constexpr std::string_view kMarks = "!#$%&'*+-.^_`|~";
  return !name.empty() && std::all_of(name.begin(), name.end(), [&](unsigned char c) {
    return (c < 0x80 && std::isalnum(c)) || kMarks.find(static_cast<char>(c)) != std::string_view::npos;
  });
}

bool is_same_name(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](unsigned char x, unsigned char y) { return std::tolower(x) == std::tolower(y); });
}

bool has_control(std::string_view value) {
  return std::any_of(value.begin(), value.end(), [](unsigned char c) { return (c < ' ' && c != '\t') || c == 0x7f; });
}

MHD_Result read_header(void* framing, MHD_ValueKind, const char* key, const char* text) {
  auto& result = *static_cast<Framing*>(framing);
  const std::string_view name = key ? key : "";
  const std::string_view value = text ? text : "";
  ++result.headers;
  if (!is_token(name)) {
    result.fault = "expected a header's name without spaces and marks before its colon";
  } else if (has_control(value)) {  // a carriage return, where another reader may see the end of the line
    result.fault = "expected a header's value without control characters";
  } else if (is_same_name(name, MHD_HTTP_HEADER_CONTENT_LENGTH)) {
    ++result.lengths;
    if (value.empty() || !std::all_of(value.begin(), value.end(), [](unsigned char c) { return std::isdigit(c); })) {
      result.fault = "expected Content-Length to be a number";
    }
  } else if (is_same_name(name, MHD_HTTP_HEADER_TRANSFER_ENCODING)) {
    ++result.encodings;
    if (!is_same_name(value, "chunked")) {
      result.fault = "expected Transfer-Encoding to be chunked";
    }
  }
  return MHD_YES;
}

// Why nobody can say for sure where the body ends; empty if all can. A proxy before this server may choose another end
// than libmicrohttpd: what it takes for a body would then be the next client's request.
std::string framing_fault(const Framing& framing) {
  if (framing.lengths + framing.encodings > 1) {
    return "expected Content-Length or Transfer-Encoding, and once";
  }
  return framing.fault;
}

}  // namespace

HttpResponse error_response(int status, const std::string& message) {
  const nlohmann::json body = {{"error", {{"status", status}, {"message", message}}}};
  return {status, body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)};
}

// One request, from its headers until its answer is out.
struct HttpServer::Exchange {
  HttpServer& server;
  MHD_Connection* connection;
  HttpRequest request;
  std::optional<HttpResponse> response;
  std::optional<HttpResponse> refusal;  // known before the body has come to its end
  size_t received = 0;
  size_t held = 0;  // bytes of HttpServer::unfinished_
  bool dispatched = false;

  // Counts the body's memory among that of unfinished requests, or no longer.
  void hold(size_t bytes) {
    server.unfinished_ += bytes - held;
    held = bytes;
  }

  void refuse(HttpResponse why) {
    refusal = std::move(why);
    std::string().swap(request.body);
    hold(0);
  }
};

namespace {

// A handler's hold on a request: answers when told to, at the latest in its destructor.
class Ticket {
 public:
  Ticket(std::function<void(HttpResponse)> answer, const std::atomic<bool>& draining)
      : answer_(std::move(answer)), draining_(draining) {}
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;
  ~Ticket() {
    respond(draining_ ? error_response(503, "the server is about to end")
                      : error_response(500, "the request was given up"));
  }

  void respond(HttpResponse response) {
    if (!answered_.exchange(true)) {
      answer_(std::move(response));
    }
  }

 private:
  const std::function<void(HttpResponse)> answer_;
  const std::atomic<bool>& draining_;
  std::atomic<bool> answered_{false};
};

}  // namespace

// What libmicrohttpd calls, on its thread.
struct HttpServer::Callbacks {
  static MHD_Result queue(Exchange& exchange, const HttpResponse& response, bool close = false) {
    MHD_Response* reply = MHD_create_response_from_buffer(response.body.size(), const_cast<char*>(response.body.data()),
                                                          MHD_RESPMEM_MUST_COPY);
    if (!reply) {
      return MHD_NO;
    }
    MHD_add_response_header(reply, MHD_HTTP_HEADER_CONTENT_TYPE, response.content_type.c_str());
    if (response.status == 503) {
      MHD_add_response_header(reply, MHD_HTTP_HEADER_RETRY_AFTER, "1");
    }
    if (close || exchange.server.draining_) {
      MHD_add_response_header(reply, MHD_HTTP_HEADER_CONNECTION, "close");
    }
    const MHD_Result result = MHD_queue_response(exchange.connection, static_cast<unsigned>(response.status), reply);
    MHD_destroy_response(reply);
    return result;
  }

  // The headers are there. The server reads nothing more of a request that it refuses here.
  static MHD_Result begin(HttpServer& server, MHD_Connection* connection, const char* url, const char* method,
                          void** state) {
    auto* exchange = new Exchange{server, connection, {method, url, ""}, std::nullopt, std::nullopt};
    *state = exchange;
    Framing framing;
    MHD_get_connection_values(connection, MHD_HEADER_KIND, &read_header, &framing);
    if (const std::string fault = framing_fault(framing); !fault.empty()) {
      return queue(*exchange, error_response(400, fault), /*close=*/true);
    }
    if (framing.headers > server.limits_.headers) {
      return queue(*exchange, error_response(431, "expected at most " + std::to_string(server.limits_.headers) +
                                                      " headers, got " + std::to_string(framing.headers)));
    }
    const char* length = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_CONTENT_LENGTH);
    if (length && std::strtoull(length, nullptr, 10) > kMostDiscarded) {
      return queue(*exchange, too_long(server));
    }
    return MHD_YES;
  }

  static HttpResponse too_long(const HttpServer& server) {
    return error_response(413, "expected a body of at most " + std::to_string(server.limits_.body_bytes) + " bytes");
  }

  static MHD_Result receive(Exchange& exchange, const char* data, size_t* size) {
    const HttpServer& server = exchange.server;
    exchange.received += *size;
    if (!exchange.refusal && exchange.received > server.limits_.body_bytes) {
      exchange.refuse(too_long(server));
    } else if (!exchange.refusal && server.unfinished_ + *size > server.limits_.unfinished_bytes) {
      exchange.refuse(error_response(503, "the server holds as many bytes of unfinished requests as it may"));
    } else if (!exchange.refusal) {
      exchange.request.body.append(data, *size);
      exchange.hold(exchange.request.body.capacity());
    }
    *size = 0;
    return exchange.received <= kMostDiscarded ? MHD_YES : MHD_NO;
  }

  static void dispatch(Exchange& exchange) {
    const auto answer = [&exchange](HttpResponse response) {
      HttpServer& server = exchange.server;
      exchange.response = std::move(response);
      {
        const std::lock_guard lock(server.mutex_);
        server.answered_.push_back(&exchange);
      }
      server.wake();
    };
    exchange.hold(0);
    MHD_suspend_connection(exchange.connection);
    exchange.dispatched = true;
    ++exchange.server.in_flight_;
    const auto ticket = std::make_shared<Ticket>(answer, exchange.server.draining_);
    try {
      exchange.server.handler_(std::move(exchange.request),
                               [ticket](HttpResponse response) { ticket->respond(std::move(response)); });
    } catch (const std::exception& error) {
      ticket->respond(error_response(500, error.what()));
    }
  }

  // No exception may reach libmicrohttpd: MHD_NO closes the connection instead.
  static MHD_Result access(void* self, MHD_Connection* connection, const char* url, const char* method,
                           const char* /*version*/, const char* data, size_t* size, void** state) {
    try {
      return proceed(self, connection, url, method, data, size, state);
    } catch (const std::exception&) {  // no memory
      return MHD_NO;
    }
  }

  static MHD_Result proceed(void* self, MHD_Connection* connection, const char* url, const char* method,
                            const char* data, size_t* size, void** state) {
    auto& server = *static_cast<HttpServer*>(self);
    if (!*state) {
      return begin(server, connection, url, method, state);
    }
    auto& exchange = *static_cast<Exchange*>(*state);
    if (*size > 0) {
      return receive(exchange, data, size);
    }
    if (exchange.refusal) {
      return queue(exchange, *exchange.refusal);
    }
    if (!exchange.dispatched) {
      dispatch(exchange);
      return MHD_YES;
    }
    return exchange.response ? queue(exchange, *exchange.response) : MHD_YES;
  }

  static void completed(void* self, MHD_Connection*, void** state, MHD_RequestTerminationCode) {
    if (auto* exchange = static_cast<Exchange*>(*state)) {
      exchange->hold(0);
      if (exchange->dispatched) {
        --static_cast<HttpServer*>(self)->in_flight_;
      }
      delete exchange;
      *state = nullptr;
    }
  }
};

HttpServer::HttpServer(const std::string& address, uint16_t port, const HttpLimits& limits, Handler handler)
    : limits_(limits), handler_(std::move(handler)) {
  sockaddr_in where = {};
  where.sin_family = AF_INET;
  where.sin_port = htons(port);
  if (inet_pton(AF_INET, address.c_str(), &where.sin_addr) != 1) {
    throw std::runtime_error("expected an IPv4 address to listen on, got '" + address + "'");
  }
  wake_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  daemon_ = MHD_start_daemon(MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME, port, nullptr, nullptr, &Callbacks::access, this,
                             MHD_OPTION_SOCK_ADDR, reinterpret_cast<sockaddr*>(&where), MHD_OPTION_NOTIFY_COMPLETED,
                             &Callbacks::completed, this, MHD_OPTION_UNESCAPE_CALLBACK, &no_escapes, nullptr,
                             MHD_OPTION_CONNECTION_LIMIT, limits_.connections, MHD_OPTION_CONNECTION_TIMEOUT,
                             limits_.idle_seconds, MHD_OPTION_CONNECTION_MEMORY_LIMIT, limits_.header_bytes,
                             MHD_OPTION_LISTEN_BACKLOG_SIZE, 1024U, MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_END);
  if (!daemon_ || wake_ < 0) {
    throw std::runtime_error("cannot listen on " + address + ":" + std::to_string(port) + " (" + std::strerror(errno) +
                             ")");
  }
  events_ = MHD_get_daemon_info(daemon_, MHD_DAEMON_INFO_EPOLL_FD)->epoll_fd;
  port_ = MHD_get_daemon_info(daemon_, MHD_DAEMON_INFO_BIND_PORT)->port;
  thread_ = std::thread([this] { serve(); });
}

HttpServer::~HttpServer() {
  ending_ = true;
  wake();
  thread_.join();
  MHD_stop_daemon(daemon_);
  close(wake_);
}

void HttpServer::stop_accepting() {
  draining_ = true;
  wake();
}

void HttpServer::wake() const { eventfd_write(wake_, 1); }

// libmicrohttpd never waits: MHD_run() takes what is ready, and this thread waits for more.
void HttpServer::serve() {
  bool is_accepting = true;
  while (!ending_) {
    if (draining_ && is_accepting) {
      is_accepting = false;
      const MHD_socket listening = MHD_quiesce_daemon(daemon_);
      if (listening != MHD_INVALID_SOCKET) {
        close(listening);
      }
    }
    resume_answered();
    MHD_run(daemon_);
    wait_for_events();
  }
  resume_answered();
  MHD_run(daemon_);
}

void HttpServer::resume_answered() {
  std::vector<Exchange*> answered;
  {
    const std::lock_guard lock(mutex_);
    answered.swap(answered_);
  }
  for (const Exchange* exchange : answered) {
    MHD_resume_connection(exchange->connection);
  }
}

// Waits until a connection or wake() has something to say, or one has been silent for too long.
void HttpServer::wait_for_events() const {
  constexpr MHD_UNSIGNED_LONG_LONG kLongestWait = 1000;  // milliseconds
  MHD_UNSIGNED_LONG_LONG timeout = kLongestWait;
  if (MHD_get_timeout(daemon_, &timeout) != MHD_YES) {
    timeout = kLongestWait;
  }
  std::array<pollfd, 2> waiting = {pollfd{events_, POLLIN, 0}, pollfd{wake_, POLLIN, 0}};
  poll(waiting.data(), waiting.size(), static_cast<int>(std::min(timeout, kLongestWait)));
  eventfd_t ignored = 0;
  eventfd_read(wake_, &ignored);
}
