/* Streams the continuation of a prompt from an artifact, in C: stream_from_c OUT PROMPT */
#include <anybit/anybit.h>
#include <stdio.h>

static void show(void* user, int32_t token, const char* text, size_t length, float logprob) {
  (void)user, (void)token, (void)logprob;
  fwrite(text, 1, length, stdout);
  fflush(stdout);
}

/* What was held back, such as the first letters of a stop string that did not come; and what went
   wrong, if something did. */
static void show_rest(void* user, const anybit_finish* finish, const char* detail, const char* text,
                      size_t length) {
  if (finish->reason == ANYBIT_ERROR) fprintf(stderr, "%s\n", detail);
  show(user, 0, text, length, 0);
}

static int refuse(char* error) {
  fprintf(stderr, "%s\n", error);
  anybit_free(error);
  return 2;
}

int main(int argc, char** argv) {
  char* error = NULL;
  if (argc != 3) {
    fputs("usage: stream_from_c OUT PROMPT\n", stderr);
    return 2;
  }
  anybit_engine* engine = anybit_open(argv[1], NULL, &error);
  if (!engine) return refuse(error);

  anybit_request request;
  anybit_request_init(engine, &request, sizeof request);
  request.text = argv[2];
  request.max_new_tokens = 32;
  request.on_token = show;
  request.on_finish = show_rest;
  anybit_handle* handle = anybit_submit(engine, &request, &error);
  if (!handle) {
    anybit_close(engine);
    return refuse(error);
  }
  anybit_finish finish = {.size = sizeof finish};
  anybit_wait(handle, &finish, NULL);
  fprintf(stderr, "\n%d tokens\n", finish.completion_tokens);
  anybit_release(handle);
  anybit_close(engine);
  return finish.reason == ANYBIT_ERROR;
}
