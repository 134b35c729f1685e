/* Every function of the C interface, used well and badly: c_api OUT ONNXRUNTIME KERNELS */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "anybit/anybit.h"

static int tokens_seen = 0;
static anybit_handle* to_cancel = NULL;

static void count(void* user, int32_t token, const char* text, size_t length, float logprob) {
  (void)token, (void)length, (void)logprob;
  ++tokens_seen;
  strcat((char*)user, text);
}

static void end(void* user, const anybit_finish* finish, const char* detail, const char* text,
                size_t length) {
  (void)finish, (void)detail, (void)length;
  strcat((char*)user, text);
}

static void cancel(void* user, int32_t token, const char* text, size_t length, float logprob) {
  (void)user, (void)token, (void)text, (void)length, (void)logprob;
  anybit_cancel(to_cancel);
}

static void say(const char* what, char* error) {
  printf("%s: %s\n", what, error ? error : "nothing");
  anybit_free(error);
}

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  char* error = NULL;
  anybit_options options;
  anybit_options_init(&options, sizeof options);
  options.onnxruntime = argv[2];
  options.kernels = argv[3];
  options.threads = 1;

  if (anybit_open("/no/such/folder", &options, &error)) return 1;
  say("no folder", error);
  if (anybit_open(NULL, NULL, NULL)) return 1; /* who does not want the reason gets none */
  options.size = 3;
  if (anybit_open(argv[1], &options, &error)) return 1;
  say("wrong size", error);
  /* A program of a version whose options ended with `backend`. */
  struct {
    size_t size;
    const char* backend;
  } older = {sizeof older, "tpu"};
  if (anybit_open(argv[1], (const anybit_options*)&older, &error)) return 1;
  say("older options", error);
  /* Nothing behind its end is written, and what it does not have has the defaults. */
  struct {
    anybit_options options;
    char behind[64];
  } newer;
  memset(&newer, 'x', sizeof newer);
  anybit_options_init(&newer.options, offsetof(anybit_options, chunk));
  const char* rest = (const char*)&newer + offsetof(anybit_options, chunk);
  while (rest < (const char*)(&newer + 1) && *rest == 'x') ++rest;
  printf("written: %d\n", rest != (const char*)(&newer + 1) || newer.options.slots != 4);
  anybit_options_init(&newer.options, sizeof newer); /* of a later version */
  printf("size: %d %d\n", newer.options.size == sizeof newer, newer.behind[63]);

  options.size = sizeof options;
  anybit_engine* engine = anybit_open(argv[1], &options, &error);
  if (!engine) {
    say("open", error);
    return 1;
  }
  char* card = anybit_card(engine, &error);
  printf("card: %s\n", card);
  anybit_free(card);

  int32_t tokens[4];
  const int64_t length = anybit_encode(engine, "The river and the town", 1, tokens, 4, &error);
  printf("encoded: %d\n", (int)length);
  size_t bytes = 0;
  char* text = anybit_decode(engine, tokens, 2, 1, &bytes, &error);
  printf("decoded: %s\n", text);
  if (bytes != strlen(text)) return 1;
  anybit_free(text);
  if (anybit_encode(NULL, "x", 1, NULL, 0, &error) != -1) return 1;
  say("no engine", error);
  const char *role = "nobody", *content = "x";
  if (anybit_render_chat(engine, &role, &content, 1, 1, &error)) return 1;
  printf("chat: %s\n", error ? "refused" : "nothing");
  anybit_free(error);

  char answer[4096] = "";
  anybit_request request;
  anybit_request_init(engine, &request, sizeof request);
  request.text = "The river and the town";
  request.max_new_tokens = 12;
  request.ignore_end = 1;
  request.on_token = count;
  request.on_finish = end;
  request.user = answer;
  anybit_handle* handle = anybit_submit(engine, &request, &error);
  anybit_finish finish;
  finish.size = sizeof finish;
  if (!handle || anybit_wait(handle, &finish, &error) != 0) return 1;
  anybit_release(handle);
  printf("finish: %d %d %d %d\n", finish.reason, finish.prompt_tokens, finish.completion_tokens,
         tokens_seen);
  printf("text: %s\n", answer);

  request.text = NULL;
  if (anybit_submit(engine, &request, &error)) return 1;
  say("no prompt", error);
  char* stats = anybit_stats(engine, &error);
  printf("stats: %s\n", stats);
  anybit_free(stats);
  const int32_t bias_token = 100000;
  const float bias = 1;
  request.text = "x";
  request.bias_tokens = &bias_token;
  request.biases = &bias;
  request.bias_count = 1;
  if (anybit_submit(engine, &request, &error)) return 1;
  say("wrong bias", error);

  request.bias_tokens = NULL;
  if (anybit_submit(engine, &request, &error)) return 1;
  say("no list", error);
  if (anybit_decode(engine, NULL, 1, 1, NULL, &error)) return 1;
  anybit_free(error);
  if (anybit_render_chat(engine, NULL, &content, 1, 1, &error)) return 1;
  say("no roles", error);

  request.bias_count = 0;
  request.max_new_tokens = 100000;
  request.on_token = cancel;
  request.on_finish = NULL;
  handle = anybit_submit(engine, &request, &error);
  anybit_cancel(handle);
  to_cancel = handle;
  anybit_wait(handle, &finish, NULL);
  printf("cancelled: %d\n", finish.reason == ANYBIT_CANCELLED);
  anybit_close(engine);
  printf("after the engine: %d\n", anybit_wait(handle, NULL, NULL));
  anybit_release(handle);

  anybit_close(NULL);
  anybit_release(NULL);
  anybit_free(NULL);
  anybit_cancel(NULL);
  printf("version: %d\n", anybit_version());
  return 0;
}
