// One request for text while it runs.
#pragma once
#include <boost/asio/steady_timer.hpp>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "service/api.hpp"
#include "service/http.hpp"

namespace anybit::service {

class Service;

// Brings the tokens of a request's choices from the engine's thread to its client. All but the
// callbacks that it gives to the engine runs on the service's thread.
class Generation : public std::enable_shared_from_this<Generation> {
 public:
  Generation(Service& service, std::shared_ptr<Exchange> exchange, Call call);

  // Hands the choices to the engine. Throws ApiError: it refuses them; none of them runs then.
  void start();

  // Ends what runs; the client is told why.
  void cancel(const ApiError& why, const char* outcome);

 private:
  struct Choice {
    Handle handle;
    std::string text;           // of an answer that is not streamed
    std::vector<Token> tokens;  // the same, where odds were asked for
    Finish finish;
    bool finished = false;
    Clock::time_point last;
  };
  struct Event {
    size_t choice;
    Clock::time_point time;
    std::optional<Token> token;  // none: `finish`
    Finish finish;
  };

  void put(Event event);
  void take();
  void on_token(Choice& choice, const Event& event);
  void on_finish(Choice& choice, const Event& event);
  void end();
  void finish(std::string body);
  void stop();
  void arm_deadline();
  void arm_comment();

  Service& service_;
  std::shared_ptr<Exchange> exchange_;
  const Call call_;
  Answers answers_;
  std::vector<Choice> choices_;
  size_t running_ = 0;
  std::string outcome_ = "ok";
  std::optional<ApiError> error_;
  asio::steady_timer deadline_, comment_;
  Clock::time_point first_;
  bool any_token_ = false;
  std::string out_;  // events that go out together

  std::mutex mutex_;
  std::vector<Event> inbox_;
};

}  // namespace anybit::service
