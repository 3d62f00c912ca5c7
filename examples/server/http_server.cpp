#include "http_server.h"

#include "http_framing.h"

#include <torchgraft/registration/error_text.h>

#include <arpa/inet.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
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
  std::optional<HttpResponse> response = std::nullopt;
  std::optional<HttpResponse> refusal = std::nullopt;  // known before the body has come to its end
  size_t received = 0;
  size_t held = 0;  // bytes of HttpServer::unfinished_
  bool dispatched = false;
  bool is_watched = false;

  int socket() const { return MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd; }

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

// What libmicrohttpd reads a stream by.
struct StreamReader {
  std::shared_ptr<HttpStream> stream;
  std::function<ssize_t(char* to, size_t most)> read;
};

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

void HttpStream::write(const std::string& text) {
  const std::lock_guard lock(mutex_);
  if (!is_closed_) {
    text_ += text;
    wake_reader();
  }
}

void HttpStream::close() {
  const std::lock_guard lock(mutex_);
  is_closed_ = true;
  wake_reader();
}

// The caller holds mutex_.
void HttpStream::wake_reader() {
  if (resume_) {
    std::exchange(resume_, nullptr)();
  }
}

// What libmicrohttpd calls, on its thread.
struct HttpServer::Callbacks {
  // The next bytes of a stream. Where there are none yet, the connection waits until somebody writes some.
  static ssize_t read_stream(Exchange& exchange, HttpStream& stream, char* to, size_t most) {
    const std::lock_guard lock(stream.mutex_);
    if (!stream.text_.empty()) {
      const size_t size = std::min(most, stream.text_.size());
      std::copy_n(stream.text_.data(), size, to);
      stream.text_.erase(0, size);
      return static_cast<ssize_t>(size);
    }
    if (stream.is_closed_) {
      return MHD_CONTENT_READER_END_OF_STREAM;
    }
    stream.resume_ = [&exchange] { exchange.server.resume_later(exchange); };
    MHD_suspend_connection(exchange.connection);
    return 0;
  }

  static MHD_Response* create_response(Exchange& exchange, const HttpResponse& response) {
    if (!response.stream) {
      return MHD_create_response_from_buffer(response.body.size(), const_cast<char*>(response.body.data()),
                                             MHD_RESPMEM_MUST_COPY);
    }
    constexpr size_t kBlock = 4096;
    auto* reader = new StreamReader{response.stream, [&exchange, &stream = *response.stream](char* to, size_t most) {
                                      return read_stream(exchange, stream, to, most);
                                    }};
    return MHD_create_response_from_callback(
        MHD_SIZE_UNKNOWN, kBlock,
        [](void* self, uint64_t, char* to, size_t most) { return static_cast<StreamReader*>(self)->read(to, most); },
        reader, [](void* self) { delete static_cast<StreamReader*>(self); });
  }

  static MHD_Result queue(Exchange& exchange, const HttpResponse& response, bool close = false) {
    MHD_Response* reply = create_response(exchange, response);
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
    auto* exchange = new Exchange{server, connection, {method, url, "", std::make_shared<HttpClient>()}};
    *state = exchange;
    const Framing framing = read_framing(connection);
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
      exchange.response = std::move(response);
      exchange.server.resume_later(exchange);
    };
    exchange.hold(0);
    MHD_suspend_connection(exchange.connection);
    exchange.dispatched = true;
    ++exchange.server.in_flight_;
    const std::shared_ptr<HttpClient> client = exchange.request.client;
    const auto ticket = std::make_shared<Ticket>(answer, exchange.server.draining_);
    try {
      exchange.server.handler_(std::move(exchange.request),
                               [ticket](HttpResponse response) { ticket->respond(std::move(response)); });
    } catch (const std::exception& error) {
      ticket->respond(error_response(500, torchgraft::one_line(error)));
    }
    exchange.request.client = client;
    if (client->is_watched_) {
      exchange.server.watch(exchange);
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
      if (exchange->request.client) {
        exchange->request.client->is_gone_ = true;
      }
      if (exchange->is_watched) {
        epoll_ctl(exchange->server.gone_, EPOLL_CTL_DEL, exchange->socket(), nullptr);
      }
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
  gone_ = epoll_create1(EPOLL_CLOEXEC);
  daemon_ = MHD_start_daemon(MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME, port, nullptr, nullptr, &Callbacks::access, this,
                             MHD_OPTION_SOCK_ADDR, reinterpret_cast<sockaddr*>(&where), MHD_OPTION_NOTIFY_COMPLETED,
                             &Callbacks::completed, this, MHD_OPTION_UNESCAPE_CALLBACK, &no_escapes, nullptr,
                             MHD_OPTION_CONNECTION_LIMIT, limits_.connections, MHD_OPTION_CONNECTION_TIMEOUT,
                             limits_.idle_seconds, MHD_OPTION_CONNECTION_MEMORY_LIMIT, limits_.header_bytes,
                             MHD_OPTION_LISTEN_BACKLOG_SIZE, 1024U, MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_END);
  if (!daemon_ || wake_ < 0 || gone_ < 0) {
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
  close(gone_);
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
    find_gone();
    resume_answered();
    MHD_run(daemon_);
    wait_for_events();
  }
  resume_answered();
  MHD_run(daemon_);
}

// Lets the loop go on with a connection that is suspended. From any thread.
void HttpServer::resume_later(Exchange& exchange) {
  {
    const std::lock_guard lock(mutex_);
    answered_.push_back(&exchange);
  }
  wake();
}

// libmicrohttpd looks at no connection that is suspended, so that nobody would see its client go.
void HttpServer::watch(Exchange& exchange) const {
  epoll_event event = {};
  event.events = EPOLLRDHUP | EPOLLONESHOT;
  event.data.ptr = &exchange;
  exchange.is_watched = epoll_ctl(gone_, EPOLL_CTL_ADD, exchange.socket(), &event) == 0;
}

void HttpServer::find_gone() const {
  std::array<epoll_event, 64> events;
  const int count = epoll_wait(gone_, events.data(), static_cast<int>(events.size()), 0);
  for (int i = 0; i < count; ++i) {
    static_cast<Exchange*>(events[static_cast<size_t>(i)].data.ptr)->request.client->is_gone_ = true;
  }
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
  std::array<pollfd, 3> waiting = {pollfd{events_, POLLIN, 0}, pollfd{wake_, POLLIN, 0}, pollfd{gone_, POLLIN, 0}};
  poll(waiting.data(), waiting.size(), static_cast<int>(std::min(timeout, kLongestWait)));
  eventfd_t ignored = 0;
  eventfd_read(wake_, &ignored);
}
