// From the engine's thread to the client's socket.
#include "service/generation.hpp"

#include <boost/asio/post.hpp>

#include "service/service.hpp"

namespace anybit::service {
namespace {

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

double rounded(double seconds) {
  return static_cast<double>(static_cast<int64_t>(seconds * 1e6)) / 1e6;
}

}  // namespace

Generation::Generation(Service& service, std::shared_ptr<Exchange> exchange, Call call)
    : service_(service),
      exchange_(std::move(exchange)),
      call_(std::move(call)),
      answers_(call_, *service.model_, service.options_.name, exchange_->request.id),
      choices_(call_.prompts.size() * static_cast<size_t>(call_.n)),
      deadline_(service.io_),
      comment_(service.io_) {}

void Generation::start() {
  const auto self = shared_from_this();
  try {
    for (size_t i = 0; i < choices_.size(); ++i) {
      Request request = call_.request(i);
      request.on_token = [self, i](const Token& token) { self->put({i, Clock::now(), token, {}}); };
      request.on_finish = [self, i](const Finish& finish) {
        self->put({i, Clock::now(), std::nullopt, finish});
      };
      choices_[i].handle = service_.engine_->submit(std::move(request));
      ++running_;
    }
  } catch (const Error& error) {
    stop();
    running_ = 0;  // so that nobody hears of those that run already
    if (dynamic_cast<const QueueFull*>(&error)) throw service_.queue_full(error.what());
    if (dynamic_cast<const Draining*>(&error)) throw ApiError(503, "draining", error.what());
    if (dynamic_cast<const Lost*>(&error)) {
      service_.end_if_lost();
      throw ApiError(503, "lost", error.what());
    }
    throw api_error(error);
  }
  service_.generations_.insert(self);
  exchange_->logged = true;
  exchange_->on_gone = [self](Gone gone) {
    self->outcome_ = gone == Gone::slow ? "slow_client" : "client_gone";
    self->stop();
  };
  arm_deadline();
  if (!call_.stream) return;
  Response head;
  head.type = "text/event-stream; charset=utf-8";
  head.headers = {{"Cache-Control", "no-store"}, {"X-Accel-Buffering", "no"}};
  service_.allow(head, exchange_->request);
  exchange_->begin(head);
  for (size_t i = 0; i < choices_.size(); ++i) out_ += answers_.opening(i);
  exchange_->write(out_);
  out_.clear();
  arm_comment();
}

void Generation::cancel(const ApiError& why, const char* outcome) {
  error_ = why;
  outcome_ = outcome;
  stop();
}

void Generation::stop() {
  for (Choice& choice : choices_) {
    if (choice.handle.id()) choice.handle.cancel();
  }
}

// On the engine's thread.
void Generation::put(Event event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  inbox_.push_back(std::move(event));
  if (inbox_.size() > 1) return;  // it is on its way already
  asio::post(service_.io_, [self = shared_from_this()] { self->take(); });
}

void Generation::take() {
  std::vector<Event> events;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    events.swap(inbox_);
  }
  if (running_ == 0) return;
  for (const Event& event : events) {
    event.token ? on_token(choices_[event.choice], event)
                : on_finish(choices_[event.choice], event);
  }
  if (!out_.empty()) {
    exchange_->write(out_);
    out_.clear();
    arm_comment();
  }
  if (running_ == 0) end();
}

void Generation::on_token(Choice& choice, const Event& event) {
  if (!any_token_) {
    any_token_ = true;
    first_ = event.time;
  }
  Metrics& metrics = service_.metrics_;
  if (choice.last == Clock::time_point{}) {
    metrics.first_token.observe(seconds(event.time - exchange_->request.began));
  } else {
    metrics.between_tokens.observe(seconds(event.time - choice.last));
  }
  choice.last = event.time;
  if (exchange_->left()) return;
  if (call_.stream) {
    out_ += answers_.event(event.choice, *event.token);
  } else {
    choice.text += event.token->text;
    if (call_.sampling.logprobs >= 0) choice.tokens.push_back(*event.token);
  }
}

void Generation::on_finish(Choice& choice, const Event& event) {
  choice.finish = event.finish;
  choice.finished = true;
  choice.handle = Handle();
  --running_;
  service_.metrics_.queued.observe(event.finish.queued_s);
  const Reason reason = event.finish.reason;
  if (reason == Reason::error) service_.end_if_lost();
  if (reason == Reason::error && !error_) {
    cancel(ApiError(500, "generation_failed", event.finish.detail), "failed");
  } else if (reason == Reason::cancelled && !error_ && outcome_ == "ok") {
    error_ = ApiError(500, "cancelled", "engine: the request was cancelled. Send it again.");
    outcome_ = "failed";
  } else if (call_.stream && !error_ && !exchange_->left()) {
    out_ += answers_.closing(event.choice, event.finish);
  }
}

// Puts a whole answer together beside the others' work: it may be long.
void Generation::end() {
  deadline_.cancel();
  comment_.cancel();
  if (call_.stream || error_ || exchange_->left()) return finish("");
  asio::post(service_.pool_, [self = shared_from_this()] {
    std::string body;
    std::optional<ApiError> problem;
    try {
      std::vector<std::string> texts;
      std::vector<std::vector<Token>> tokens;
      std::vector<Finish> finishes;
      for (Choice& choice : self->choices_) {
        texts.push_back(std::move(choice.text));
        tokens.push_back(std::move(choice.tokens));
        finishes.push_back(choice.finish);
      }
      body = self->answers_.whole(texts, tokens, finishes);
    } catch (const std::exception& error) {
      problem = ApiError(500, "internal", error.what());
    }
    asio::post(self->service_.io_, [self, body = std::move(body), problem]() mutable {
      if (problem) {
        self->error_ = problem;
        self->outcome_ = "failed";
      }
      self->finish(std::move(body));
    });
  });
}

void Generation::finish(std::string body) {
  std::vector<Finish> finishes;
  int prompt = 0, cached = 0, completion = 0;
  for (const Choice& choice : choices_) {
    finishes.push_back(choice.finish);
    prompt += choice.finish.prompt_tokens;
    cached += choice.finish.cached_tokens;
    completion += choice.finish.completion_tokens;
  }
  Ordered& note = exchange_->note;
  note = {{"outcome", outcome_},
          {"stream", call_.stream},
          {"choices", choices_.size()},
          {"prompt_tokens", prompt},
          {"cached_tokens", cached},
          {"completion_tokens", completion},
          {"queued_s", rounded(finishes.front().queued_s)}};
  if (any_token_) note["first_token_s"] = rounded(seconds(first_ - exchange_->request.began));
  if (error_) note["error"] = error_->what();
  service_.count(call_.endpoint, outcome_);
  service_.metrics_.whole.observe(seconds(Clock::now() - exchange_->request.began));
  if (call_.stream) {
    exchange_->write(error_ ? Answers::error_event(*error_) : answers_.end(finishes));
    exchange_->end();
  } else if (error_) {
    exchange_->respond(service_.error(*error_, exchange_->request));
  } else if (!exchange_->left()) {
    Response response;
    response.body = std::move(body);
    service_.allow(response, exchange_->request);
    exchange_->respond(response);
  }
  service_.log(*exchange_, std::nullopt);
  service_.generations_.erase(shared_from_this());
  service_.stop_when_idle();
}

void Generation::arm_deadline() {
  deadline_.expires_after(service_.options_.deadline);
  deadline_.async_wait([self = shared_from_this()](boost::system::error_code ec) {
    if (ec || self->running_ == 0) return;
    const auto limit = std::chrono::duration<double>(self->service_.options_.deadline).count();
    self->cancel(
        ApiError(504, "deadline",
                 "request: got no end within " + Json(limit).dump() +
                     " seconds, the server's deadline. Ask for fewer tokens, or try later."),
        "deadline");
  });
}

// Proxies and clients take a silent connection for a dead one; and a dead one shows when written to.
void Generation::arm_comment() {
  comment_.expires_after(service_.options_.keep_alive);
  comment_.async_wait([self = shared_from_this()](boost::system::error_code ec) {
    if (ec || self->running_ == 0) return;
    self->exchange_->write(": still at it\n\n");
    self->arm_comment();
  });
}

}  // namespace anybit::service
