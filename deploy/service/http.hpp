// HTTP/1.1 for clients that nobody trusts: bounded reads, deadlines, bounded output. All of it runs
// on the one thread of the io_context.
#pragma once
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "service/json.hpp"
#include "service/log.hpp"

namespace anybit::service {

namespace asio = boost::asio;
using Clock = std::chrono::steady_clock;

struct HttpLimits {
  size_t header = 16 << 10, body = 4 << 20;
  // Bytes of a stream that wait for a client who does not read them.
  size_t output = 1 << 20;
  size_t connections = 1024;
  // For a request's header, for its body, and for the next bytes of an answer to be taken.
  std::chrono::milliseconds patience{20'000};
  // Between two requests.
  std::chrono::milliseconds idle{75'000};
};

// A request: what its header says, and its body.
struct HttpRequest {
  std::string id;      // the client's X-Request-Id where it is fit for a log, else one of ours
  std::string client;  // address and port
  std::string method, path;
  std::string host, origin, authorization, content_type;
  std::string body;
  bool preflight = false;  // has Access-Control-Request-Method
  Clock::time_point began;
};

struct Response {
  int status = 200;
  std::string body;
  std::string type = "application/json";
  std::vector<std::pair<std::string, std::string>> headers = {};
};

// Why nothing more can be sent.
enum class Gone { left, slow };

class Connection;

// One request and the way to answer it: respond(), or begin(), write() ..., end(). What is written
// after the client has gone is dropped.
class Exchange {
 public:
  Exchange(HttpRequest request, std::shared_ptr<Connection> connection);

  HttpRequest request;
  // Called once where the client leaves, or does not read, before all was sent.
  std::function<void(Gone)> on_gone;
  // Whether the log has its line already, written by somebody who knew more.
  bool logged = false;
  // For the log's line of this request.
  Ordered note = Ordered::object();

  void respond(const Response& response);
  // The head of an answer whose length is not known yet; its body is ignored.
  void begin(const Response& head);
  void write(std::string_view text);
  void end();

  int status() const { return status_; }
  bool begun() const { return status_ != 0; }
  bool ended() const { return ended_; }
  // Whether nobody is there to be answered.
  bool left() const { return !connection_; }

 private:
  friend class Connection;
  std::shared_ptr<Connection> connection_;  // nullptr: the client has gone
  int status_ = 0;
  bool ended_ = false, chunked_ = false;
};

// What the service does for the HTTP layer.
class Handler {
 public:
  virtual ~Handler() = default;
  // Sees a request before its body is read; an answer refuses it.
  virtual std::optional<Response> admit(const HttpRequest& request) = 0;
  virtual void handle(std::shared_ptr<Exchange> exchange) = 0;
  // The answer to what is no good HTTP, of which the request has what could be read.
  virtual Response refusal(const HttpRequest& request, int status, const std::string& code,
                           const std::string& message) = 0;
  // A request has been answered to its end, or its client has gone.
  virtual void answered(const Exchange& exchange, std::optional<Gone> gone) = 0;
  // Whether connections are to be closed behind an answer.
  virtual bool closing() const = 0;
};

// Accepts connections on every address of a name.
class Listener {
 public:
  // Throws Error: the address is wrong; Unavailable: it is in use.
  Listener(asio::io_context& io, Handler& handler, Log& log, const HttpLimits& limits,
           const std::string& host, uint16_t port);

  uint16_t port() const;
  size_t connections() const { return connections_.size(); }
  // Requests that have come in whole and are not answered to their end.
  size_t busy() const { return busy_; }

  // Called whenever busy() becomes 0.
  std::function<void()> on_idle;

  // Accepts no more, and closes every connection.
  void close();

 private:
  friend class Connection;
  using Acceptor = asio::ip::tcp::acceptor;
  void accept(Acceptor& acceptor);

  asio::io_context& io_;
  Handler& handler_;
  Log& log_;
  HttpLimits limits_;
  std::list<Acceptor> acceptors_;
  std::set<std::shared_ptr<Connection>> connections_;
  size_t busy_ = 0;
};

}  // namespace anybit::service
