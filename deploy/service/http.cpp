// A connection as a machine of five states, fed by one read and emptied by one write at a time.
#include "service/http.hpp"

#include <sys/resource.h>

#include <algorithm>
#include <anybit/error.hpp>
#include <array>
#include <boost/asio/buffer.hpp>
#include <boost/asio/post.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <cstdio>
#include <random>

namespace anybit::service {

namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;

namespace {

constexpr size_t kRead = 8 << 10;
constexpr size_t kAhead = 64 << 10;     // of the next requests while one is answered
constexpr size_t kDiscard = 16 << 20;   // of a body that was refused, so that its answer arrives
constexpr size_t kTurnedAway = 32;      // connections beyond the limit that are told so
constexpr int kSendBuffer = 128 << 10;  // the kernel's, of each connection
constexpr std::chrono::seconds kLinger{2};
constexpr std::chrono::milliseconds kPause{
    100};  // where no connection can be taken, such as for want of files

const char* phrase(int status) {
  return http::obsolete_reason(http::int_to_status(static_cast<unsigned>(status))).data();
}

// Unlike any other of this process, and unlikely to be one of another.
std::string new_id() {
  static std::mt19937_64 generator{std::random_device{}()};
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(generator()));
  return text;
}

bool fit_for_a_log(std::string_view id) {
  const auto good = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '_' || c == '.';
  };
  return !id.empty() && id.size() <= 64 && std::all_of(id.begin(), id.end(), good);
}

std::string written(const tcp::endpoint& endpoint) {
  const std::string address = endpoint.address().to_string();
  const std::string port = std::to_string(endpoint.port());
  return (endpoint.address().is_v6() ? "[" + address + "]:" : address + ":") + port;
}

}  // namespace

// The states of one connection:
//   idle     no byte of a request has come
//   reading  a request is coming in
//   busy     it is being answered; what comes meanwhile waits, and the end of the stream means that
//            the client has gone
//   closing  the last answer is out; what still comes is thrown away, because closing a socket that
//            has unread bytes would take back the answer
//   closed
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(Listener& listener, tcp::socket socket)
      : listener_(listener),
        socket_(std::move(socket)),
        read_timer_(listener.io_),
        write_timer_(listener.io_) {
    error_code ignored;
    socket_.set_option(tcp::no_delay(true), ignored);
    socket_.set_option(asio::socket_base::send_buffer_size(kSendBuffer), ignored);
    const tcp::endpoint peer = socket_.remote_endpoint(ignored);
    if (!ignored) client_ = written(peer);
  }

  void start() {
    parse();
    read();
  }

  void turn_away() {
    refuse(503, "too_many_connections",
           "connections: got more than " + std::to_string(listener_.limits_.connections) +
               ", expected at most that many. Try again later, or use fewer at once.");
    read();
  }

  void close() {
    if (state_ == State::closed) return;
    state_ = State::closed;
    error_code ignored;
    socket_.close(ignored);
    read_timer_.cancel();
    write_timer_.cancel();
    leave(Gone::left);
    listener_.connections_.erase(shared_from_this());
  }

  // ---------------------------------------------------------------- for Exchange

  bool keeps_alive() const { return keep_alive_ && !listener_.handler_.closing(); }
  bool takes_chunks() const { return chunks_; }

  void send_head(const Response& response, const std::string& id, std::optional<size_t> length) {
    if (!keeps_alive() || (!length && !chunks_)) keep_alive_ = false;
    std::string head =
        "HTTP/1.1 " + std::to_string(response.status) + " " + phrase(response.status);
    head += "\r\nContent-Type: " + response.type;
    if (length) {
      head += "\r\nContent-Length: " + std::to_string(*length);
    } else if (chunks_) {
      head += "\r\nTransfer-Encoding: chunked";
    }
    head += keep_alive_ ? "\r\nConnection: keep-alive" : "\r\nConnection: close";
    head += "\r\nX-Content-Type-Options: nosniff";
    if (!id.empty()) head += "\r\nX-Request-Id: " + id;
    for (const auto& [name, value] : response.headers) head += "\r\n" + name + ": " + value;
    send(head + "\r\n\r\n");
  }

  void send(std::string_view text) {
    if (state_ == State::closed) return;
    waiting_ += text;
    if (!writing_) write();
  }

  // Of a stream: a client that does not read is given up.
  void send_bounded(std::string_view text) {
    if (slow_) return;
    send(text);
    if (waiting_.size() + out_.size() - sent_ <= listener_.limits_.output) return;
    slow_ = true;
    // Not at once: whoever writes is in the middle of something.
    asio::post(listener_.io_, [self = shared_from_this()] { self->abandon(Gone::slow); });
  }

  void finished() {
    if (!writing_) answered();
  }

 private:
  enum class State { idle, reading, busy, closing, closed };
  using Parser = http::request_parser<http::string_body>;

  // ---------------------------------------------------------------- reading

  void read() {
    const bool full = state_ == State::busy && in_.size() >= kAhead;
    if (reading_ || full || state_ == State::closed) return;
    reading_ = true;
    socket_.async_read_some(asio::buffer(chunk_),
                            [self = shared_from_this()](error_code ec, size_t n) {
                              self->reading_ = false;
                              self->has_read(ec, n);
                            });
  }

  void has_read(error_code ec, size_t count) {
    if (state_ == State::closed) return;
    if (ec == asio::error::eof && exchange_ && exchange_->ended_) {
      keep_alive_ = false;  // it asks for nothing more, and may still read
      return;
    }
    if (ec) return abandon(Gone::left);
    if (state_ == State::closing) {
      discarded_ += count;
      if (discarded_ > kDiscard) return close();
    } else {
      in_.append(chunk_.data(), count);
      if (state_ != State::busy) parse();
    }
    read();
  }

  // Takes what has come of a request; leaves what belongs to the next one.
  void parse() {
    if (!parser_) {
      if (in_.empty()) {
        state_ = State::idle;
        arm(listener_.limits_.idle);
        return;
      }
      state_ = State::reading;
      arm(listener_.limits_.patience);
      parser_.emplace();
      parser_->header_limit(static_cast<uint32_t>(listener_.limits_.header));
      parser_->body_limit(listener_.limits_.body);
      began_ = Clock::now();
      request_ = HttpRequest{};
    }
    size_t taken = 0;
    while (taken < in_.size() && !parser_->is_done()) {
      const bool had_header = parser_->is_header_done();
      error_code ec;
      taken += parser_->put(asio::buffer(in_.data() + taken, in_.size() - taken), ec);
      if (ec == http::error::need_more) break;
      if (ec) return refuse_bytes(ec);
      if (!had_header && parser_->is_header_done() && !admit()) break;
    }
    in_.erase(0, taken);
    if (!exchange_ && parser_->is_done()) dispatch();
  }

  template <class Name>
  std::string field(Name name) const {
    const auto text = parser_->get()[name];
    return std::string(text.data(), text.size());
  }

  // Whether the request may go on; else it is answered.
  bool admit() {
    const auto& header = parser_->get();
    if (header.count(http::field::host) > 1) {  // a proxy in front may have taken the other one
      refuse(400, "bad_http", "request: got more than one Host, expected one. Correct the client.");
      return false;
    }
    const std::string id = field("X-Request-Id");
    request_.id = fit_for_a_log(id) ? id : new_id();
    request_.client = client_;
    request_.method = std::string(header.method_string());
    request_.path = std::string(header.target());
    if (const size_t query = request_.path.find('?'); query != std::string::npos) {
      request_.path.erase(query);
    }
    request_.host = field(http::field::host);
    request_.origin = field(http::field::origin);
    request_.authorization = field(http::field::authorization);
    request_.content_type = field(http::field::content_type);
    request_.preflight = header.find(http::field::access_control_request_method) != header.end();
    request_.began = began_;
    keep_alive_ = parser_->keep_alive();
    chunks_ = header.version() >= 11;
    if (const auto refused = listener_.handler_.admit(request_)) {
      if (!parser_->is_done()) keep_alive_ = false;  // its body is not going to be read
      begin_exchange();
      exchange_->respond(*refused);
      return false;
    }
    if (!parser_->is_done()) {
      arm(listener_.limits_.patience);
      parser_->eager(true);
      const bool expects = field(http::field::expect) == "100-continue";
      if (expects) send("HTTP/1.1 100 Continue\r\n\r\n");
    }
    return true;
  }

  void dispatch() {
    request_.body = std::move(parser_->get().body());
    begin_exchange();
    listener_.handler_.handle(exchange_);
  }

  void begin_exchange() {
    state_ = State::busy;
    read_timer_.cancel();
    ++listener_.busy_;
    exchange_ = std::make_shared<Exchange>(std::move(request_), shared_from_this());
  }

  void refuse_bytes(error_code ec) {
    const HttpLimits& limits = listener_.limits_;
    if (ec == http::error::header_limit) {
      refuse(431, "header_too_large",
             "header: got more than " + std::to_string(limits.header) +
                 " bytes, expected at most that many. Send fewer or shorter fields.");
    } else if (ec == http::error::body_limit) {
      refuse(413, "body_too_large",
             "body: got more than " + std::to_string(limits.body) +
                 " bytes, expected at most that many. Send a shorter request.");
    } else {
      refuse(400, "bad_http",
             "request: got " + ec.message() + ", expected HTTP/1.1. Correct the client.");
    }
  }

  void refuse(int status, const std::string& code, const std::string& message) {
    keep_alive_ = false;
    request_.client = client_;
    request_.began = parser_ ? began_ : Clock::now();
    if (request_.id.empty()) request_.id = new_id();
    if (parser_) request_.origin = field(http::field::origin);
    begin_exchange();
    exchange_->respond(listener_.handler_.refusal(exchange_->request, status, code, message));
  }

  // ---------------------------------------------------------------- writing

  void write() {
    if (sent_ == out_.size()) {
      out_.clear();
      sent_ = 0;
      out_.swap(waiting_);
    }
    if (out_.empty()) {
      writing_ = false;
      write_timer_.cancel();
      if (exchange_ && exchange_->ended_) answered();
      return;
    }
    writing_ = true;
    arm_write();
    const auto rest = asio::buffer(out_.data() + sent_, out_.size() - sent_);
    socket_.async_write_some(rest, [self = shared_from_this()](error_code ec, size_t n) {
      if (self->state_ == State::closed) return;
      if (ec) return self->abandon(Gone::left);
      self->sent_ += n;
      self->write();
    });
  }

  // The answer is out.
  void answered() {
    if (out_.capacity() > kAhead) std::string().swap(out_);
    leave(std::nullopt);
    if (state_ == State::closed) return;
    parser_.reset();
    if (!keep_alive_) {
      state_ = State::closing;
      in_.clear();
      error_code ignored;
      socket_.shutdown(tcp::socket::shutdown_send, ignored);
      arm(kLinger);
    } else {
      parse();
    }
    read();
  }

  // ---------------------------------------------------------------- the end

  // Ends the exchange, if there is one.
  void leave(std::optional<Gone> gone) {
    if (!exchange_) return;
    const std::shared_ptr<Exchange> ended = std::move(exchange_);
    exchange_.reset();
    ended->connection_.reset();
    --listener_.busy_;
    if (gone && ended->on_gone) ended->on_gone(*gone);
    ended->on_gone = nullptr;
    listener_.handler_.answered(*ended, gone);
    if (listener_.busy_ == 0 && listener_.on_idle) listener_.on_idle();
  }

  void abandon(Gone gone) {
    const auto self = shared_from_this();
    leave(gone);
    close();
  }

  void arm(std::chrono::milliseconds time) {
    read_timer_.expires_after(time);
    read_timer_.async_wait([self = shared_from_this()](error_code ec) {
      // An expiry that was on its way when the timer was set anew is none.
      if (ec || self->read_timer_.expiry() > Clock::now()) return;
      if (self->state_ == State::reading) {
        self->refuse(408, "too_slow", "request: got only a part of it in time. Send it faster.");
      } else if (self->state_ != State::busy) {
        self->close();
      }
    });
  }

  void arm_write() {
    write_timer_.expires_after(listener_.limits_.patience);
    write_timer_.async_wait([self = shared_from_this()](error_code ec) {
      if (ec || self->write_timer_.expiry() > Clock::now()) return;
      self->abandon(Gone::slow);
    });
  }

  Listener& listener_;
  tcp::socket socket_;
  asio::steady_timer read_timer_, write_timer_;
  State state_ = State::idle;
  std::string client_;

  std::array<char, kRead> chunk_;
  std::string in_;  // read and not yet taken
  bool reading_ = false;
  size_t discarded_ = 0;
  std::optional<Parser> parser_;
  Clock::time_point began_;
  HttpRequest request_;

  std::shared_ptr<Exchange> exchange_;
  bool keep_alive_ = true, chunks_ = false, slow_ = false;
  std::string waiting_, out_;  // out_ is being written, from sent_ on
  size_t sent_ = 0;
  bool writing_ = false;
};

// ---------------------------------------------------------------- Exchange

Exchange::Exchange(HttpRequest request, std::shared_ptr<Connection> connection)
    : request(std::move(request)), connection_(std::move(connection)) {}

void Exchange::respond(const Response& response) {
  status_ = response.status;
  ended_ = true;
  if (!connection_) return;
  const auto connection = connection_;  // the last write may end this exchange
  connection->send_head(response, request.id, response.body.size());
  if (request.method != "HEAD") connection->send(response.body);
  connection->finished();
}

void Exchange::begin(const Response& head) {
  status_ = head.status;
  if (!connection_) return;
  chunked_ = connection_->takes_chunks();
  connection_->send_head(head, request.id, std::nullopt);
}

void Exchange::write(std::string_view text) {
  if (!connection_ || text.empty()) return;
  if (!chunked_) return connection_->send_bounded(text);
  char length[20];
  std::snprintf(length, sizeof length, "%zx\r\n", text.size());
  connection_->send_bounded(std::string(length).append(text).append("\r\n"));
}

void Exchange::end() {
  ended_ = true;
  if (!connection_) return;
  const auto connection = connection_;
  if (chunked_) connection->send("0\r\n\r\n");
  connection->finished();
}

// ---------------------------------------------------------------- Listener

namespace {

tcp::resolver::results_type resolve(asio::io_context& io, const std::string& host, uint16_t port) {
  error_code ec;
  tcp::resolver resolver(io);
  const auto found = resolver.resolve(host, std::to_string(port), tcp::resolver::passive, ec);
  if (ec || found.empty()) {
    throw Error("--host",
                "got " + host + " (" + ec.message() + "), expected an address of this machine",
                "Give one, such as 127.0.0.1, or 0.0.0.0 for all");
  }
  return found;
}

// As many as the process may have files for, less what else it opens.
size_t most_connections(size_t wanted) {
  constexpr rlim_t kOthers = 32;
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return wanted;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  getrlimit(RLIMIT_NOFILE, &limit);
  if (limit.rlim_cur == RLIM_INFINITY) return wanted;
  const rlim_t left =
      limit.rlim_cur > kOthers + kTurnedAway ? limit.rlim_cur - kOthers - kTurnedAway : 1;
  return std::min<size_t>(wanted, left);
}

}  // namespace

Listener::Listener(asio::io_context& io, Handler& handler, Log& log, const HttpLimits& limits,
                   const std::string& host, uint16_t port)
    : io_(io), handler_(handler), log_(log), limits_(limits) {
  limits_.connections = most_connections(limits.connections);
  error_code absent;
  std::set<asio::ip::address> seen;
  for (const auto& found : resolve(io, host, port)) {
    if (!seen.insert(found.endpoint().address()).second) continue;
    // Where any port will do, the first address chooses it for all.
    const tcp::endpoint endpoint(found.endpoint().address(),
                                 acceptors_.empty() ? port : this->port());
    error_code ec;
    Acceptor acceptor(io);
    acceptor.open(endpoint.protocol(), ec);
    if (!ec) acceptor.set_option(Acceptor::reuse_address(true), ec);
    if (!ec) acceptor.bind(endpoint, ec);
    if (!ec) acceptor.listen(asio::socket_base::max_listen_connections, ec);
    if (!ec) {
      acceptors_.push_back(std::move(acceptor));
    } else if (ec == asio::error::address_family_not_supported ||
               ec == error_code(EADDRNOTAVAIL, boost::system::system_category())) {
      absent = ec;  // a name may have an address of IPv6 on a machine without it
    } else {
      throw Unavailable(
          "--port",
          "got " + written(endpoint) + " (" + ec.message() + "), expected one that is free",
          "Stop what uses it, or give another with --host and --port");
    }
  }
  if (acceptors_.empty()) {
    throw Unavailable(
        "--host",
        "got " + host + " (" + absent.message() + "), expected an address of this machine",
        "Give one, such as 127.0.0.1, or 0.0.0.0 for all");
  }
  for (Acceptor& acceptor : acceptors_) accept(acceptor);
}

uint16_t Listener::port() const {
  error_code ignored;
  return acceptors_.front().local_endpoint(ignored).port();
}

void Listener::accept(Acceptor& acceptor) {
  acceptor.async_accept([this, &acceptor](error_code ec, tcp::socket socket) {
    if (ec == asio::error::operation_aborted || !acceptor.is_open()) return;
    if (ec && ec != asio::error::connection_aborted) {  // which may stay for a while
      log_.write("error", "accept", {{"problem", ec.message()}});
      const auto pause = std::make_shared<asio::steady_timer>(io_, kPause);
      pause->async_wait([this, &acceptor, pause](error_code) {
        if (acceptor.is_open()) accept(acceptor);
      });
      return;
    }
    if (!ec && connections_.size() < limits_.connections + kTurnedAway) {
      const bool full = connections_.size() >= limits_.connections;
      const auto connection = std::make_shared<Connection>(*this, std::move(socket));
      connections_.insert(connection);
      full ? connection->turn_away() : connection->start();
    }
    accept(acceptor);
  });
}

void Listener::close() {
  error_code ignored;
  for (Acceptor& acceptor : acceptors_) acceptor.close(ignored);
  for (const auto& connection : std::set<std::shared_ptr<Connection>>(connections_)) {
    connection->close();
  }
}

}  // namespace anybit::service
