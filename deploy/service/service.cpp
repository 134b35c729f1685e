// Routes, keys, readiness, metrics, and the end.
#include "service/service.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/post.hpp>
#include <cctype>
#include <cmath>
#include <csignal>
#include <fstream>

#include "service/generation.hpp"
#include "service/page.hpp"

namespace anybit::service {
namespace {

constexpr const char *kChat = "/v1/chat/completions", *kCompletions = "/v1/completions",
                     *kModels = "/v1/models", *kTokenize = "/tokenize",
                     *kDetokenize = "/detokenize";
// Bodies that wait to be read, in number and in bytes.
constexpr size_t kWaiting = 1024, kWaitingBytes = 64 << 20;

bool is_post(const std::string& path) {
  return path == kChat || path == kCompletions || path == kTokenize || path == kDetokenize;
}

bool is_model(const std::string& path) { return path.rfind(std::string(kModels) + "/", 0) == 0; }

bool is_get(const std::string& path) {
  return path == "/" || path == "/health" || path == "/ready" || path == "/metrics" ||
         path == kModels || is_model(path);
}

bool is_open(const std::string& path) {
  return path == "/" || path == "/health" || path == "/ready";
}

std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

// Takes as long for a wrong key as for the right one: time must not tell how much of it is right.
bool same(std::string_view given, std::string_view key) {
  unsigned difference = given.size() != key.size();
  for (size_t i = 0; i < key.size(); ++i) {
    const char c = given.empty() ? '\0' : given[i % given.size()];
    difference |= static_cast<unsigned char>(c ^ key[i]);
  }
  return difference == 0;
}

bool opens(const std::string& authorization, const std::vector<std::string>& keys) {
  constexpr std::string_view kScheme = "bearer ";
  if (lower(authorization.substr(0, kScheme.size())) != kScheme) return false;
  const std::string_view given = std::string_view(authorization).substr(kScheme.size());
  bool any = false;
  for (const std::string& key : keys) any |= same(given, key);
  return any;
}

// %2F and the like, in the name of a model.
std::string decoded(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto digit = [](char c) { return std::isxdigit(static_cast<unsigned char>(c)) != 0; };
    if (text[i] == '%' && i + 2 < text.size() && digit(text[i + 1]) && digit(text[i + 2])) {
      plain += static_cast<char>(std::stoi(text.substr(i + 1, 2), nullptr, 16));
      i += 2;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

// Without the port; of [::1]:8080, [::1].
std::string name_of(const std::string& host) {
  const size_t colon = host.rfind(':');
  const size_t bracket = host.rfind(']');
  if (colon == std::string::npos || (bracket != std::string::npos && colon < bracket)) return host;
  return host.substr(0, colon);
}

// An address as it stands in a URL or an option; none: it is a name.
std::optional<asio::ip::address> address_of(std::string text) {
  if (text.size() > 2 && text.front() == '[' && text.back() == ']') {
    text = text.substr(1, text.size() - 2);
  }
  boost::system::error_code ec;
  const auto address = asio::ip::make_address(text, ec);
  return ec ? std::nullopt : std::optional(address);
}

bool is_loopback(const std::string& name) {
  const auto address = address_of(name);
  return address ? address->is_loopback() : name == "localhost";
}

// Whether a Content-Type is JSON, whatever stands behind it.
bool is_json(const std::string& type) {
  std::string media = lower(type.substr(0, type.find(';')));
  media.erase(media.find_last_not_of(" \t") + 1);
  return media == "application/json";
}

size_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  size_t size = 0, resident = 0;
  file >> size >> resident;
  return resident * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

const char* outcome_of(const Exchange& exchange, std::optional<Gone> gone) {
  const int status = exchange.status();
  if (gone) return *gone == Gone::slow ? "slow_client" : "client_gone";
  if (status == 429) return "queue_full";
  if (status == 503) return "not_ready";
  return status < 500 ? "refused" : "failed";
}

}  // namespace

std::vector<std::string> read_keys(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::vector<std::string> keys;
  for (std::string line; std::getline(file, line);) {
    line.erase(line.find_last_not_of(" \t\r") + 1);
    line.erase(0, line.find_first_not_of(" \t"));
    if (!line.empty()) keys.push_back(line);
  }
  if (keys.empty()) {
    throw Error(
        "--api-key",
        "got " + path.string() + ", which cannot be read or is empty, expected a key a line",
        "Write one into it, such as: openssl rand -hex 32 > " + path.string());
  }
  return keys;
}

Service::Service(ServiceOptions options, Log& log)
    : options_(std::move(options)),
      log_(log),
      listener_(io_, *this, log, options_.http, options_.host, options_.port) {
  listener_.on_idle = [this] { stop_when_idle(); };
  signals_.add(SIGTERM);
  signals_.add(SIGINT);
  // It asks for a new file of the log; where there is none it says that the terminal is gone, which
  // nohup wants passed over.
  struct sigaction inherited{};
  sigaction(SIGHUP, nullptr, &inherited);
  if (log_.is_file() || inherited.sa_handler != SIG_IGN) signals_.add(SIGHUP);
  await_signal();
  log_.write("info", "listening",
             {{"host", options_.host}, {"port", listener_.port()}, {"pid", getpid()}});
  if (!is_loopback(options_.host) && options_.keys.empty()) {
    log_.write("warning", "open",
               {{"problem",
                 "anybody who reaches " + options_.host + " may use this server: give --api-key"}});
  }
}

Service::~Service() {
  pool_.stop();  // nobody is there to be answered
  pool_.join();
  if (loader_.joinable()) loader_.join();
}

void Service::run() {
  load();
  while (true) {
    try {
      io_.run();
      break;
    } catch (const std::exception& error) {  // of one request; the others go on
      log_.write("error", "exception", {{"problem", error.what()}});
    }
  }
  if (failure_) {
    engine_.reset();
    std::rethrow_exception(failure_);
  }
  if (!model_) {
    log_.write("info", "stopped");
    log_.finish();
    std::_Exit(0);  // the model is still being opened, which nothing interrupts
  }
  engine_.reset();
  log_.write("info", "stopped");
}

// Beside the answers to /health: a large model takes its time.
void Service::load() {
  loader_ = std::thread([this] {
    std::shared_ptr<Model> model;
    std::exception_ptr failure;
    try {
      model = Model::load(options_.folder, options_.load);
    } catch (...) {
      failure = std::current_exception();
    }
    asio::post(io_, [this, model, failure] {
      failure_ = failure;
      if (model && !draining_) loaded(model);
      if (!model) stop();
    });
  });
}

void Service::loaded(std::shared_ptr<Model> model) {
  try {
    engine_ = std::make_unique<Engine>(model, options_.engine);
  } catch (...) {
    failure_ = std::current_exception();
    return stop();
  }
  model_ = std::move(model);
  if (options_.name.empty()) options_.name = model_->card().name;
  const Card& card = model_->card();
  // More would find no room at any time, and be asked to come back.
  const size_t room = options_.engine.queue + static_cast<size_t>(card.slots);
  options_.calls.choices = static_cast<int>(std::min<size_t>(options_.calls.choices, room));
  log_.write("info", "ready",
             {{"model", options_.name},
              {"bits", card.scheme},
              {"backend", card.backend},
              {"choice", card.choice},
              {"slots", card.slots},
              {"context", card.max_context},
              {"memory", card.memory.text()}});
}

void Service::await_signal() {
  signals_.async_wait([this](boost::system::error_code ec, int number) {
    if (ec) return;
    if (number == SIGHUP && log_.is_file()) {
      log_.reopen();
      log_.write("info", "reopened");
    } else if (draining_) {
      return stop();  // asked twice
    } else {
      const char* name = number == SIGTERM ? "SIGTERM" : number == SIGINT ? "SIGINT" : "SIGHUP";
      log_.write("info", "draining", {{"signal", name}, {"running", generations_.size()}});
      drain();
    }
    await_signal();
  });
}

void Service::end_if_lost() {
  const std::string why = engine_->stats().lost;
  if (why.empty() || failure_) return;
  log_.write("error", "lost", {{"problem", why}, {"running", generations_.size()}});
  failure_ = std::make_exception_ptr(Unavailable("engine", why, "Start again"));
  if (!draining_) drain();
}

void Service::drain() {
  draining_ = true;
  drain_timer_.expires_after(options_.drain);
  drain_timer_.async_wait([this](boost::system::error_code ec) {
    if (ec) return;
    const ApiError why(503, "draining",
                       "server: it is shutting down. Send the request to another one.");
    for (const auto& generation : generations_) generation->cancel(why, "shutdown");
    drain_timer_.expires_after(std::chrono::seconds(2));  // for the reason to reach the clients
    drain_timer_.async_wait([this](boost::system::error_code stopped) {
      if (!stopped) stop();
    });
  });
  stop_when_idle();
}

void Service::stop_when_idle() {
  if (draining_ && generations_.empty() && listener_.busy() == 0) stop();
}

void Service::stop() {
  asio::post(io_, [this] {  // whoever calls may still be using a connection
    draining_ = true;
    listener_.close();
    signals_.cancel();
    drain_timer_.cancel();
    io_.stop();
  });
}

// ---------------------------------------------------------------- routes

std::optional<Response> Service::admit(const HttpRequest& request) {
  const auto refused = [&](int status, const std::string& code, const std::string& message) {
    return error(ApiError(status, code, message), request);
  };
  // A page of another site whose name leads to this machine's address (DNS rebinding) could
  // otherwise ask a server that asks for no key.
  const std::string host = lower(name_of(request.host));
  if (options_.keys.empty() && !is_ours(host)) {
    return refused(
        403, "host",
        "Host: got " + shown(host) +
            ", expected an address, or a name of this server. Start it with --allow-host "
            "NAME, or with --api-key.");
  }
  const bool post = is_post(request.path), get = is_get(request.path);
  if (!post && !get) {
    return refused(404, "not_found",
                   "path: got " + shown(request.path) +
                       ", expected one such as /v1/models. See docs/serving.md.");
  }
  if (request.method == "OPTIONS" && request.preflight && !options_.cors.empty())
    return std::nullopt;
  const bool known =
      post ? request.method == "POST" : request.method == "GET" || request.method == "HEAD";
  if (!known) {
    Response response = refused(405, "method",
                                "method: got " + shown(request.method) + ", expected " +
                                    (post ? "POST" : "GET") + ". Use that.");
    response.headers.push_back({"Allow", post ? "POST" : "GET, HEAD"});
    return response;
  }
  if (!options_.keys.empty() && !is_open(request.path) &&
      !opens(request.authorization, options_.keys)) {
    Response response =
        refused(401, "invalid_api_key",
                "Authorization: got no valid key, expected one that this server knows. Send "
                "Authorization: Bearer KEY.");
    response.headers.push_back({"WWW-Authenticate", "Bearer"});
    return response;
  }
  // Anything else a page of another site may send without asking first.
  if (post && !is_json(request.content_type)) {
    return refused(415, "content_type",
                   "Content-Type: got " + shown(request.content_type) +
                       ", expected application/json. Send that header.");
  }
  if (post) {
    if (const auto reason = not_ready()) return error(*reason, request);
  }
  return std::nullopt;
}

// An address needs no name server, which is what a page of another site would have to change.
bool Service::is_ours(const std::string& host) const {
  const auto is = [&host](const std::string& name) { return name == "*" || lower(name) == host; };
  return host.empty() || host == "localhost" || address_of(host) || is(options_.host) ||
         std::any_of(options_.hosts.begin(), options_.hosts.end(), is);
}

std::optional<ApiError> Service::not_ready() const {
  std::optional<ApiError> reason;
  if (draining_) {
    reason =
        ApiError(503, "draining", "server: it is shutting down. Send the request to another one.");
  } else if (!engine_) {
    reason = ApiError(503, "loading", "server: it is loading the model. Try again soon.");
  }
  if (reason) reason->retry_after = 1;
  return reason;
}

void Service::handle(std::shared_ptr<Exchange> exchange) {
  guarded(exchange, [&] {
    const HttpRequest& request = exchange->request;
    if (request.method == "OPTIONS") {
      Response response{204, "", "text/plain"};
      allow(response, request);
      response.headers.push_back({"Access-Control-Allow-Methods", "GET, POST"});
      response.headers.push_back(
          {"Access-Control-Allow-Headers", "Authorization, Content-Type, X-Request-Id"});
      response.headers.push_back({"Access-Control-Max-Age", "600"});
      return exchange->respond(response);
    }
    if (is_get(request.path)) return get(exchange);
    if (const auto reason = not_ready()) throw *reason;
    if (request.path == kTokenize) return answer(exchange, tokenize);
    if (request.path == kDetokenize) return answer(exchange, detokenize);
    generate(request.path == kChat ? Endpoint::chat : Endpoint::completions, exchange);
  });
}

void Service::get(const std::shared_ptr<Exchange>& exchange) {
  const HttpRequest& request = exchange->request;
  Response response;
  if (request.path == "/") {
    response.type = "text/html; charset=utf-8";
    response.body = std::string(page());
    response.headers = {
        {"Content-Security-Policy",
         "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
         "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
         "frame-ancestors 'none'"},
        {"Referrer-Policy", "no-referrer"},
        {"Cache-Control", "no-cache"}};
  } else if (request.path == "/health") {
    response.body = R"({"status":"alive"})";
  } else if (request.path == "/metrics") {
    response.type = "text/plain; version=0.0.4; charset=utf-8";
    response.body = metrics();
  } else if (const auto reason = not_ready()) {
    throw *reason;
  } else if (request.path == "/ready") {
    response.body = R"({"status":"ready"})";
  } else {
    const Ordered entry = model_entry(*model_, options_.name, began_);
    if (is_model(request.path)) {
      const std::string name = decoded(request.path.substr(std::string(kModels).size() + 1));
      if (name != options_.name) {
        throw ApiError(
            404, "model_not_found",
            "model: got " + shown(name) + ", expected " + options_.name + ". Give that name.",
            "model");
      }
      response.body = dump(entry);
    } else {
      response.body = dump({{"object", "list"}, {"data", Ordered::array({entry})}});
    }
  }
  allow(response, request);
  exchange->respond(response);
}

// Answers what `work` throws.
void Service::guarded(const std::shared_ptr<Exchange>& exchange,
                      const std::function<void()>& work) {
  std::optional<ApiError> problem;
  try {
    work();
  } catch (const ApiError& error) {
    problem = error;
  } catch (const Error& error) {
    problem = api_error(error);
  } catch (const std::exception& error) {
    problem = ApiError(500, "internal", std::string("server: ") + error.what());
  }
  if (problem && !exchange->begun()) refuse(exchange, *problem);
}

void Service::off_thread(const std::shared_ptr<Exchange>& exchange, Work work) {
  // Whoever takes the body has it: the pool, or where the client leaves before, nobody.
  struct Job {
    std::string body;
    std::atomic<bool> taken{false};
  };
  const size_t bytes = exchange->request.body.size();
  // One is taken however long it is.
  if (waiting_ && (waiting_ >= kWaiting || waiting_bytes_ + bytes > kWaitingBytes)) {
    ApiError full(429, "busy",
                  "server: got " + std::to_string(waiting_) + " requests to read, of " +
                      std::to_string(waiting_bytes_) +
                      " bytes, and cannot keep more. Try again later.");
    full.retry_after = 1;
    throw full;
  }
  const auto job = std::make_shared<Job>();
  job->body = std::move(exchange->request.body);
  const auto leave = [this, bytes] { --waiting_, waiting_bytes_ -= bytes; };
  ++waiting_;
  waiting_bytes_ += bytes;
  exchange->on_gone = [job, leave](Gone) {
    if (job->taken.exchange(true)) return;
    std::string().swap(job->body);
    leave();
  };
  asio::post(pool_, [this, exchange, job, leave, work = std::move(work)] {
    if (job->taken.exchange(true)) return;
    Then then;
    try {
      then = work(job->body);
    } catch (...) {
      then = [failure = std::current_exception()] { std::rethrow_exception(failure); };
    }
    std::string().swap(job->body);
    asio::post(io_, [this, exchange, leave, then = std::move(then)] {
      leave();
      if (!exchange->left()) guarded(exchange, then);
    });
  });
}

void Service::answer(const std::shared_ptr<Exchange>& exchange,
                     Ordered (*work)(std::string_view, const Model&)) {
  off_thread(exchange, [this, exchange, work, model = model_](std::string_view body) -> Then {
    Response response;
    response.body = dump(work(body, *model));
    return [this, exchange, response]() mutable {
      allow(response, exchange->request);
      exchange->respond(response);
    };
  });
}

void Service::generate(Endpoint endpoint, const std::shared_ptr<Exchange>& exchange) {
  // Before the work of reading it; the engine has the last word.
  const Stats stats = engine_->stats();
  if (stats.queued >= options_.engine.queue + stats.slots - std::min(stats.running, stats.slots)) {
    throw queue_full("queue: got " + std::to_string(stats.queued) +
                     " that wait, expected fewer. Try again later.");
  }
  off_thread(exchange, [this, endpoint, exchange, model = model_](std::string_view body) -> Then {
    const auto call =
        std::make_shared<Call>(read_call(endpoint, body, *model, options_.name, options_.calls));
    return [this, exchange, call] {
      std::make_shared<Generation>(*this, exchange, std::move(*call))->start();
    };
  });
}

void Service::refuse(const std::shared_ptr<Exchange>& exchange, const ApiError& problem) {
  exchange->note["error"] = problem.what();
  exchange->respond(error(problem, exchange->request));
}

Response Service::error(const ApiError& problem, const HttpRequest& request) const {
  Response response{problem.status, dump(problem.json())};
  if (problem.retry_after)
    response.headers.push_back({"Retry-After", std::to_string(problem.retry_after)});
  allow(response, request);
  return response;
}

Response Service::refusal(const HttpRequest& request, int status, const std::string& code,
                          const std::string& message) {
  return error(ApiError(status, code, message), request);
}

// Lets a page of the chosen origin read the answer.
void Service::allow(Response& response, const HttpRequest& request) const {
  if (options_.cors.empty()) return;
  response.headers.push_back({"Vary", "Origin"});
  if (options_.cors != "*" && request.origin != options_.cors) return;
  response.headers.push_back({"Access-Control-Allow-Origin", options_.cors});
  response.headers.push_back({"Access-Control-Expose-Headers", "X-Request-Id, Retry-After"});
}

// How long the queue takes, as far as the past can tell.
ApiError Service::queue_full(const std::string& message) const {
  ApiError full(429, "queue_full", message);
  const Stats stats = engine_->stats();
  const double each = metrics_.whole.count()
                          ? metrics_.whole.sum() / static_cast<double>(metrics_.whole.count())
                          : 1;
  const double slots = static_cast<double>(std::max<size_t>(stats.slots, 1));
  full.retry_after = static_cast<int>(
      std::clamp(std::ceil(each * static_cast<double>(stats.queued) / slots), 1.0, 60.0));
  return full;
}

// ---------------------------------------------------------------- the log and the metrics

void Service::answered(const Exchange& exchange, std::optional<Gone> gone) {
  if (exchange.status()) ++metrics_.responses[exchange.status()];
  const std::string& path = exchange.request.path;
  if (!exchange.logged && (path == kChat || path == kCompletions)) {
    count(path == kChat ? Endpoint::chat : Endpoint::completions, outcome_of(exchange, gone));
  }
  const bool answered = exchange.status() == 200 || exchange.status() == 503;
  const bool of_a_monitor = answered && is_get(path) && !is_model(path);
  if (!exchange.logged && !of_a_monitor) log(exchange, gone);
}

void Service::count(Endpoint endpoint, const std::string& outcome) {
  ++metrics_.requests[{endpoint == Endpoint::chat ? "chat" : "completions", outcome}];
}

void Service::log(const Exchange& exchange, std::optional<Gone> gone) {
  const HttpRequest& request = exchange.request;
  const int status = exchange.status();
  Ordered line{{"id", request.id},
               {"client", request.client},
               {"method", request.method},
               {"path", request.path.substr(0, 200)},
               {"status", status ? Ordered(status) : Ordered(nullptr)}};
  const auto took = Clock::now() - request.began;
  line["seconds"] = std::chrono::duration_cast<std::chrono::microseconds>(took).count() / 1e6;
  if (gone || status >= 400) line["outcome"] = outcome_of(exchange, gone);
  line.update(exchange.note);
  log_.write(status >= 500 && status != 503 ? "error" : "info", "request", line);
}

std::string Service::metrics() const {
  const Stats stats = engine_ ? engine_->stats() : Stats{};
  const auto real = [](auto number) { return static_cast<double>(number); };
  std::vector<std::pair<std::string, double>> requests, responses;
  for (const auto& [key, number] : metrics_.requests) {
    requests.emplace_back(label("endpoint", key.first) + "," + label("outcome", key.second),
                          real(number));
  }
  for (const auto& [status, number] : metrics_.responses) {
    responses.emplace_back(label("code", std::to_string(status)), real(number));
  }
  std::string text;
  if (model_) {
    const Card& card = model_->card();
    text += metric("anybit_model_info", "gauge", "The model that is loaded.",
                   {{label("model", options_.name) + "," + label("bits", card.scheme) + "," +
                         label("backend", card.backend) + "," + label("proof", card.proof),
                     1}});
  }
  text +=
      metric("anybit_ready", "gauge", "1 where requests for text are taken.", not_ready() ? 0 : 1);
  text += metric("anybit_requests_total", "counter", "Requests for text that ended, by outcome.",
                 requests);
  text += metric("anybit_http_responses_total", "counter", "Answers of every kind, by status.",
                 responses);
  text += metric("anybit_sequences_total", "counter", "Texts that ended in the engine, by reason.",
                 {{label("reason", "stop"), real(stats.stopped)},
                  {label("reason", "length"), real(stats.full)},
                  {label("reason", "cancelled"), real(stats.cancelled)},
                  {label("reason", "error"), real(stats.failed)}});
  text += metric("anybit_queue_length", "gauge", "Texts that wait for a slot.", real(stats.queued));
  text += metric("anybit_slots", "gauge", "Texts that can run at once.", real(stats.slots));
  text += metric("anybit_slots_used", "gauge", "Texts that run.", real(stats.running));
  text += metric("anybit_kv_tokens_used", "gauge", "Tokens in the caches of running texts.",
                 real(stats.cache_tokens));
  text += metric("anybit_kv_tokens_capacity", "gauge", "Tokens that all caches hold.",
                 real(stats.cache_capacity));
  text += metric("anybit_prompt_tokens_total", "counter", "Prompt tokens that were computed.",
                 real(stats.prompt_tokens));
  text += metric("anybit_cached_tokens_total", "counter", "Prompt tokens that a cache had already.",
                 real(stats.cached_tokens));
  text += metric("anybit_completion_tokens_total", "counter", "New tokens.",
                 real(stats.completion_tokens));
  text += metric("anybit_steps_total", "counter", "Calls of the model.", real(stats.steps));
  text += metric("anybit_model_seconds_total", "counter", "Seconds in calls of the model.",
                 stats.model_s);
  text += metric("anybit_engine_seconds_total", "counter",
                 "Seconds of the engine's own work around them.", stats.engine_s);
  text += metric("anybit_time_to_first_token_seconds",
                 "From a request's first byte to its first token.", metrics_.first_token);
  text += metric("anybit_time_between_tokens_seconds", "From one token of a text to the next.",
                 metrics_.between_tokens);
  text += metric("anybit_queue_seconds", "From the queue to a slot.", metrics_.queued);
  text += metric("anybit_request_seconds", "From a request's first byte to the end of its text.",
                 metrics_.whole);
  text += metric("anybit_connections", "gauge", "Open connections.", real(listener_.connections()));
  text += metric("anybit_log_lines_lost_total", "counter",
                 "Lines of the log that could not be written.", real(log_.lost()));
  text += metric("process_resident_memory_bytes", "gauge",
                 "Memory of the process, mapped weights included.", real(resident_bytes()));
  text += metric("process_start_time_seconds", "gauge", "When the process began.", real(began_));
  return text;
}

}  // namespace anybit::service
