// anybit-serve OUT: an artifact as a service that clients of OpenAI's API can use.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <anybit/anybit.hpp>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "service/service.hpp"

namespace {

using anybit::service::ServiceOptions;

constexpr int kInput = 2, kOther = 1;

struct Words {
  std::string folder, api_key, log = "-";
  double timeout = 600, drain = 30, client = 20, idle = 75, keep_alive = 15;
  size_t body = 4096, memory = 0;
};

// CLI::Range lets NaN pass.
CLI::Validator seconds(double least) {
  const CLI::Range range(least, 1e6);
  const auto check = [range](std::string& text) {
    return std::isnan(std::strtod(text.c_str(), nullptr)) ? "got " + text + ", expected a number"
                                                          : range(text);
  };
  return CLI::Validator(check, range.get_description());
}

// As browsers name the origin of a page: in lower case, without a path, and the scheme's own port left
// out. "null", of pages from files, could be anybody's.
std::string check_origin(const std::string& text) {
  const size_t host = text.find("://");
  const auto ends_with = [&](const char* port) {
    const std::string end = port;
    return text.size() > end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
  };
  const bool own_port = (text.rfind("http:", 0) == 0 && ends_with(":80")) ||
                        (text.rfind("https:", 0) == 0 && ends_with(":443"));
  const bool good =
      host != text.npos && host > 0 && host + 3 < text.size() && !own_port &&
      text.find_first_of("/?# \t\r\n", host + 3) == text.npos &&
      std::none_of(text.begin(), text.end(), [](char c) { return c >= 'A' && c <= 'Z'; });
  if (text.empty() || text == "*" || good) return "";
  return "got " + anybit::service::shown(text) +
         ", expected *, or an origin as browsers name it, in lower case and without a path or its "
         "scheme's own port, such as https://app.example";
}

void declare(CLI::App& app, ServiceOptions& o, Words& words) {
  app.set_help_flag("-h,--help", "print this and exit");
  app.set_version_flag("--version", std::string("anybit-serve ") + anybit::kVersion,
                       "print the version and exit");
  app.option_defaults()->always_capture_default()->multi_option_policy(
      CLI::MultiOptionPolicy::TakeLast);
  app.add_option("OUT", words.folder,
                 "artifact folder of python -m exporter, or its onnx or engine folder alone")
      ->required();
  app.add_option("--host", o.host, "address to listen on; 0.0.0.0 is every one of this machine");
  app.add_option("--port", o.port, "0 takes a free one, which the log names");
  app.add_option("--backend", o.load.backend,
                 "tensorrt: the engine on a GPU; onnxruntime: the ONNX file on the CPU; auto: the "
                 "engine where it fits this machine")
      ->check(CLI::IsMember({"auto", "tensorrt", "onnxruntime"}));
  app.add_option("--slots", o.load.slots, "texts that run at once")->check(CLI::Range(1, 1024));
  app.add_option("--threads", o.load.threads, "that compute; 0: one for each core")
      ->check(CLI::Range(0, 4096));
  app.add_option("--capacity", o.load.capacity,
                 "most tokens of a text with its prompt; 0: what the model allows")
      ->check(CLI::Range(0, INT32_MAX));
  app.add_option("--chunk", o.load.chunk, "most prompt tokens in one call of the model")
      ->check(CLI::Range(1, 65536));
  app.add_option("--memory", words.memory, "MB that caches and calls may take; 0: what is free")
      ->check(CLI::Range(0, 1 << 30));
  app.add_flag("--verify", o.load.verify, "compare the weights with their SHA-256 first");
  app.add_option("--onnxruntime", o.load.onnxruntime, "libonnxruntime.so, or its folder");
  app.add_option("--tensorrt", o.load.tensorrt,
                 "libnvinfer.so.10, libnvinfer.so.11 or libtensorrt_rtx.so.1, or its folder");
  app.add_flag("!--no-cuda-graphs", o.load.cuda_graphs,
               "do not replay the steps of a static cache on the GPU as CUDA graphs");
  app.add_option("--kernels", o.load.kernels, "libanybit_onnxruntime.so, or its folder");
  app.add_option("--name", o.name, "what clients call the model; empty: its own name");
  app.add_option("--api-key", words.api_key,
                 "file of keys, one a line; clients must send one of them");
  app.add_option("--cors", o.cors, "origin whose pages may call this server, or *; empty: none")
      ->check(CLI::Validator(check_origin, ""));
  app.add_option("--allow-host", o.hosts,
                 "another name by which this server is asked where it has no key; * is any")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--queue", o.engine.queue,
                 "most texts that wait for a slot; more are refused with 429");
  app.add_option("--max-tokens", o.calls.max_tokens, "most new tokens of a text; 0: the context")
      ->check(CLI::Range(0, INT32_MAX));
  app.add_option("--max-choices", o.calls.choices, "most texts of one request")
      ->check(CLI::Range(1, 1024));
  app.add_option("--max-body", words.body, "KB of a request's body")->check(CLI::Range(1, 1 << 20));
  app.add_option("--max-connections", o.http.connections, "at once")->check(CLI::Range(1, 1 << 20));
  app.add_option("--client-timeout", words.client,
                 "seconds for a client to send a header, or a body, or to take what was sent")
      ->check(seconds(0.001));
  app.add_option("--idle-timeout", words.idle, "seconds for a client to send its next request")
      ->check(seconds(0.001));
  app.add_option("--keep-alive", words.keep_alive,
                 "seconds after which a stream without tokens gets a comment")
      ->check(seconds(0.001));
  app.add_option("--timeout", words.timeout, "seconds from a request to the end of its text")
      ->check(seconds(0.001));
  app.add_option("--drain-timeout", words.drain,
                 "seconds that running texts have to end after SIGTERM")
      ->check(seconds(0));
  app.add_option("--log", words.log,
                 "file that lines of JSON are appended to; - is standard error");
}

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);
  ServiceOptions options;
  Words words;
  CLI::App app("Serves an artifact with OpenAI's API. docs/serving.md says how.", "anybit-serve");
  declare(app, options, words);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {
    return app.exit(asked);
  } catch (const CLI::Error& error) {
    std::fprintf(stderr, "%s. anybit-serve --help lists the options.\n", error.what());
    return kInput;
  }
  options.folder = words.folder;
  options.load.memory_limit = words.memory * 1'000'000;
  options.http.body = words.body << 10;
  options.http.patience = milliseconds(words.client);
  options.http.idle = milliseconds(words.idle);
  options.keep_alive = milliseconds(words.keep_alive);
  options.deadline = milliseconds(words.timeout);
  options.drain = milliseconds(words.drain);
  try {
    if (!words.api_key.empty()) options.keys = anybit::service::read_keys(words.api_key);
    anybit::service::Log log(words.log);
    anybit::service::Service service(std::move(options), log);
    service.run();
    return 0;
  } catch (const anybit::Unavailable& error) {  // which another try may find
    std::fprintf(stderr, "%s\n", error.what());
    return kOther;
  } catch (const anybit::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return kInput;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "anybit-serve: %s\n", error.what());
    return kOther;
  }
}
