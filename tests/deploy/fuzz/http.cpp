// What comes on a connection: any bytes, in two packets.
#include "service/http.hpp"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "fuzz.hpp"

namespace anybit::fuzz {
namespace {

using namespace service;

// Answers at once, by the path: whole or in pieces.
class Echo final : public Handler {
 public:
  bool handled = false;

  std::optional<Response> admit(const HttpRequest& request) override {
    if (request.path == "/refused") return Response{403, "{}"};
    return std::nullopt;
  }
  void handle(std::shared_ptr<Exchange> exchange) override {
    handled = true;
    if (exchange->request.path != "/stream")
      return exchange->respond({200, exchange->request.body});
    exchange->begin({200, "", "text/event-stream"});
    exchange->write(exchange->request.body);
    exchange->write("data");
    exchange->end();
  }
  Response refusal(const HttpRequest&, int status, const std::string&,
                   const std::string& message) override {
    return {status, message};
  }
  void answered(const Exchange&, std::optional<Gone>) override {}
  bool closing() const override { return false; }
};

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "http: %s\n", what);
  std::abort();
}

}  // namespace

bool http(std::string_view input) {
  static asio::io_context io;
  static Echo echo;
  static Log log("/dev/null");
  static const HttpLimits limits = [] {
    HttpLimits small;
    small.header = 1024;
    small.body = 4096;
    return small;
  }();
  static Listener listener(io, echo, log, limits, "127.0.0.1", 0);
  if (input.empty()) return false;
  const size_t first = (input.size() - 1) * static_cast<unsigned char>(input[0]) / 255;
  input.remove_prefix(1);
  input = input.substr(0, 48 << 10);  // what the system takes without a reader
  echo.handled = false;

  const int client = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(listener.port());
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  check(connect(client, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0,
        "connect");
  const linger at_once{1, 0};  // so that no port waits for late packets
  setsockopt(client, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  std::string answer;
  bool ended = false;
  const auto serve = [&] {
    io.poll();
    char room[8192];
    for (ssize_t got; (got = recv(client, room, sizeof room, MSG_DONTWAIT)) >= 0;) {
      if (got == 0) {
        ended = true;
        return;
      }
      answer.append(room, static_cast<size_t>(got));
    }
  };
  for (const std::string_view part :
       {input.substr(0, first), input.substr(std::min(first, input.size()))}) {
    send(client, part.data(), part.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    serve();
  }
  shutdown(client, SHUT_WR);
  for (int i = 0; i < 100 && !ended; ++i) serve();
  close(client);
  for (int i = 0; i < 100 && listener.connections() > 0; ++i) io.poll();
  check(ended, "a connection whose client has ended it stays open");
  check(listener.connections() == 0 && listener.busy() == 0, "a connection is left");
  check(answer.empty() || answer.compare(0, 9, "HTTP/1.1 ") == 0, "an answer of another form");
  return echo.handled;
}

}  // namespace anybit::fuzz
