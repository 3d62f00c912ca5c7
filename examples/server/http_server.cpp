#include "http_server.h"

#include <arpa/inet.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <utility>

namespace {

// The server reads a body that is too long to its end and forgets it, so that the client sees the answer instead of a
// reset connection. Beyond this many bytes it stops, so that nobody keeps it reading for ever.
constexpr size_t kMostDiscarded = size_t{1} << 30;

// Leaves the escapes of an address as they are: no name here needs one, and %00 would cut a name short.
size_t no_escapes(void*, MHD_Connection*, char* text) { return std::strlen(text); }

MHD_Result count_header(void* count, MHD_ValueKind, const char*, const char*) {
  ++*static_cast<int*>(count);
  return MHD_YES;
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
  size_t received = 0;
  bool dispatched = false;
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
  static MHD_Result queue(Exchange& exchange, const HttpResponse& response) {
    MHD_Response* reply = MHD_create_response_from_buffer(response.body.size(), const_cast<char*>(response.body.data()),
                                                          MHD_RESPMEM_MUST_COPY);
    if (!reply) {
      return MHD_NO;
    }
    MHD_add_response_header(reply, MHD_HTTP_HEADER_CONTENT_TYPE, response.content_type.c_str());
    if (response.status == 503) {
      MHD_add_response_header(reply, MHD_HTTP_HEADER_RETRY_AFTER, "1");
    }
    if (exchange.server.draining_) {
      MHD_add_response_header(reply, MHD_HTTP_HEADER_CONNECTION, "close");
    }
    const MHD_Result result = MHD_queue_response(exchange.connection, static_cast<unsigned>(response.status), reply);
    MHD_destroy_response(reply);
    return result;
  }

  // The headers are there. The server reads nothing more of a request that it refuses here.
  static MHD_Result begin(HttpServer& server, MHD_Connection* connection, const char* url, const char* method,
                          void** state) {
    auto* exchange = new Exchange{server, connection, {method, url, ""}, std::nullopt};
    *state = exchange;
    int headers = 0;
    MHD_get_connection_values(connection, MHD_HEADER_KIND, &count_header, &headers);
    if (headers > server.limits_.headers) {
      return queue(*exchange, error_response(431, "expected at most " + std::to_string(server.limits_.headers) +
                                                      " headers, got " + std::to_string(headers)));
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
    exchange.received += *size;
    if (exchange.received <= exchange.server.limits_.body_bytes) {
      exchange.request.body.append(data, *size);
    } else {
      std::string().swap(exchange.request.body);
    }
    *size = 0;
    return exchange.received <= kMostDiscarded ? MHD_YES : MHD_NO;
  }

  static void dispatch(Exchange& exchange) {
    const auto answer = [&exchange](HttpResponse response) {
      exchange.response = std::move(response);
      MHD_resume_connection(exchange.connection);
    };
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
    if (exchange.received > server.limits_.body_bytes) {
      return queue(exchange, too_long(server));
    }
    if (!exchange.dispatched) {
      dispatch(exchange);
      return MHD_YES;
    }
    return exchange.response ? queue(exchange, *exchange.response) : MHD_YES;
  }

  static void completed(void* self, MHD_Connection*, void** state, MHD_RequestTerminationCode) {
    if (const auto* exchange = static_cast<Exchange*>(*state)) {
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
  daemon_ = MHD_start_daemon(MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME, port, nullptr, nullptr,
                             &Callbacks::access, this, MHD_OPTION_SOCK_ADDR, reinterpret_cast<sockaddr*>(&where),
                             MHD_OPTION_NOTIFY_COMPLETED, &Callbacks::completed, this, MHD_OPTION_UNESCAPE_CALLBACK,
                             &no_escapes, nullptr, MHD_OPTION_CONNECTION_LIMIT, limits_.connections,
                             MHD_OPTION_CONNECTION_TIMEOUT, limits_.idle_seconds, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
                             limits_.header_bytes, MHD_OPTION_LISTEN_BACKLOG_SIZE, 1024U, MHD_OPTION_END);
  if (!daemon_) {
    throw std::runtime_error("cannot listen on " + address + ":" + std::to_string(port) + " (" + std::strerror(errno) +
                             ")");
  }
}

HttpServer::~HttpServer() { MHD_stop_daemon(daemon_); }

uint16_t HttpServer::port() const { return MHD_get_daemon_info(daemon_, MHD_DAEMON_INFO_BIND_PORT)->port; }

void HttpServer::stop_accepting() {
  draining_ = true;
  const MHD_socket listening = MHD_quiesce_daemon(daemon_);
  if (listening != MHD_INVALID_SOCKET) {
    close(listening);
  }
}
