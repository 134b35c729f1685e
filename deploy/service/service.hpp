// The service: which path answers what, from the first byte of a request to the last of its answer.
#pragma once
#include <anybit/engine.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/thread_pool.hpp>
#include <ctime>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "service/api.hpp"
#include "service/http.hpp"
#include "service/log.hpp"
#include "service/metrics.hpp"

namespace anybit::service {

struct ServiceOptions {
  std::filesystem::path folder;
  LoadOptions load;
  EngineOptions engine;
  std::string host = "127.0.0.1";
  uint16_t port = 8080;
  HttpLimits http;
  CallLimits calls;
  std::string name;                // of the model for clients; empty: its own
  std::vector<std::string> keys;   // any of them opens; none: no key is asked for
  std::string cors;                // the origin that other pages may call from; empty: none
  std::vector<std::string> hosts;  // more names of this server; "*": any
  std::chrono::milliseconds deadline{600'000}, drain{30'000}, keep_alive{15'000};
};

// Keys of a file, one a line. Throws Error: it cannot be read, or has none.
std::vector<std::string> read_keys(const std::filesystem::path& file);

class Generation;

class Service : public Handler {
 public:
  // Listens from here on; the model is opened by run().
  // Throws Error: the address cannot be used.
  Service(ServiceOptions options, Log& log);
  ~Service() override;

  // Opens the model and answers until SIGTERM or SIGINT has drained it. Throws what opening the model
  // did.
  void run();

  std::optional<Response> admit(const HttpRequest& request) override;
  void handle(std::shared_ptr<Exchange> exchange) override;
  Response refusal(const HttpRequest& request, int status, const std::string& code,
                   const std::string& message) override;
  void answered(const Exchange& exchange, std::optional<Gone> gone) override;
  bool closing() const override { return draining_; }

 private:
  friend class Generation;

  void load();
  void loaded(std::shared_ptr<Model> model);
  void await_signal();
  // Takes nothing new, and ends with what runs.
  void drain();
  // Does so where nothing can run any more: what watches over the process starts a new one, which can.
  void end_if_lost();
  void stop_when_idle();
  void stop();

  void get(const std::shared_ptr<Exchange>& exchange);
  // Work on a body, and what is to be done with its result on the service's thread. Both may throw.
  using Then = std::function<void()>;
  using Work = std::function<Then(std::string_view body)>;
  void off_thread(const std::shared_ptr<Exchange>& exchange, Work work);
  void answer(const std::shared_ptr<Exchange>& exchange,
              Ordered (*work)(std::string_view, const Model&));
  void generate(Endpoint endpoint, const std::shared_ptr<Exchange>& exchange);
  void guarded(const std::shared_ptr<Exchange>& exchange, const std::function<void()>& work);
  bool is_ours(const std::string& host) const;
  void refuse(const std::shared_ptr<Exchange>& exchange, const ApiError& error);
  Response error(const ApiError& error, const HttpRequest& request) const;
  void allow(Response& response, const HttpRequest& request) const;
  ApiError queue_full(const std::string& message) const;
  std::optional<ApiError> not_ready() const;
  void count(Endpoint endpoint, const std::string& outcome);
  void log(const Exchange& exchange, std::optional<Gone> gone);
  std::string metrics() const;

  ServiceOptions options_;
  Log& log_;
  asio::io_context io_{1};
  asio::signal_set signals_{io_};
  asio::steady_timer drain_timer_{io_};
  Metrics metrics_;
  std::shared_ptr<Model> model_;
  std::unique_ptr<Engine> engine_;
  std::set<std::shared_ptr<Generation>> generations_;
  bool draining_ = false;
  std::time_t began_ = std::time(nullptr);
  std::exception_ptr failure_;
  std::thread loader_;
  size_t waiting_ = 0, waiting_bytes_ = 0;  // bodies that the pool is to read
  asio::thread_pool pool_{2};  // parses bodies and tokenizes prompts; puts whole answers together
  Listener listener_;
};

}  // namespace anybit::service
