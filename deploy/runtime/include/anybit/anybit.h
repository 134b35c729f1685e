/* The C interface of the runtime: small, stable, and what other languages bind to.

   Functions that can fail return null or a negative number and, where `error` is not null, set
   *error to a text "where: problem. fix." that anybit_free frees. No C++ exception leaves them.
   Every text is UTF-8 and ends with a zero; one that a model wrote may have zeros in it, so its
   length comes with it. Structures begin with their size: set them up with the function that gives
   the defaults, and programs keep running when later versions add fields. */
#ifndef ANYBIT_ANYBIT_H
#define ANYBIT_ANYBIT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#ifdef __GNUC__
#pragma GCC visibility push(default)
#endif

typedef struct anybit_engine anybit_engine; /* a model, and what runs requests on it */
typedef struct anybit_handle anybit_handle; /* a request that an engine has taken */

/* How a model is opened; the fields are those of anybit::LoadOptions and anybit::EngineOptions,
   null stands for "". */
typedef struct anybit_options {
  size_t size;
  const char* backend;
  int slots, threads, capacity, chunk;
  size_t memory_limit;
  int verify;
  const char* onnxruntime;
  const char* kernels;
  size_t queue;
  int reuse_prefixes;
  const char* tensorrt;
  int cuda_graphs;
} anybit_options;

/* Why a request ended. */
typedef enum anybit_reason {
  ANYBIT_STOP = 0,
  ANYBIT_LENGTH = 1,
  ANYBIT_CANCELLED = 2,
  ANYBIT_ERROR = 3
} anybit_reason;

/* How a request ended; the fields are those of anybit::Finish. */
typedef struct anybit_finish {
  size_t size;
  int reason; /* anybit_reason */
  int prompt_tokens, cached_tokens, completion_tokens;
  double queued_s, prefill_s, decode_s;
} anybit_finish;

/* Called on the engine's thread; must not block, and may call anybit_cancel only. The texts are gone
   when they return. */
typedef void (*anybit_on_token)(void* user, int32_t token, const char* text, size_t length,
                                float logprob);
/* detail: the stop string, or what went wrong; text: what was held back and may be shown now. */
typedef void (*anybit_on_finish)(void* user, const anybit_finish* finish, const char* detail,
                                 const char* text, size_t length);

/* A text to continue; the fields are those of anybit::Request and anybit::Sampling. */
typedef struct anybit_request {
  size_t size;
  const int32_t* tokens; /* the prompt, or */
  size_t token_count;
  const char* text; /* the prompt where there are no tokens */
  int max_new_tokens;
  float temperature, top_p, min_p;
  int top_k;
  float repetition_penalty, presence_penalty, frequency_penalty;
  const int32_t* bias_tokens; /* logit_bias */
  const float* biases;
  size_t bias_count;
  uint64_t seed;
  int logprobs; /* -1: none; any other number gives on_token each token's own */
  const char* const* stop;
  size_t stop_count;
  const int32_t* stop_tokens;
  size_t stop_token_count;
  int ignore_end;
  anybit_on_token on_token;   /* or null */
  anybit_on_finish on_finish; /* or null */
  void* user;                 /* for the two */
} anybit_request;

/* The version of this interface; a library of a later one runs programs of this. */
#define ANYBIT_VERSION 1
int anybit_version(void);

/* The defaults. size: sizeof *options of the program's own header; no byte behind it is written. */
void anybit_options_init(anybit_options* options, size_t size);
/* The same of a request; the sampling is the one that the model's makers want. */
void anybit_request_init(const anybit_engine* engine, anybit_request* request, size_t size);

/* Opens OUT of python -m exporter, or its onnx or engine folder; options may be null. */
anybit_engine* anybit_open(const char* folder, const anybit_options* options, char** error);
/* Cancels what runs. Handles stay good. Null is let pass. */
void anybit_close(anybit_engine* engine);

/* The model card as a JSON object, to be freed by anybit_free. */
char* anybit_card(const anybit_engine* engine, char** error);

/* What the engine is doing and has done, the fields of anybit::Stats, as a JSON object to be freed by
   anybit_free. */
char* anybit_stats(const anybit_engine* engine, char** error);

/* Writes the first `room` tokens of a text; returns how many it has, or -1. */
int64_t anybit_encode(const anybit_engine* engine, const char* text, int add_special,
                      int32_t* tokens, size_t room, char** error);
/* The text of tokens, to be freed by anybit_free; its length where `length` is not null. */
char* anybit_decode(const anybit_engine* engine, const int32_t* tokens, size_t count,
                    int skip_special, size_t* length, char** error);
/* The prompt of a conversation as the model's chat template says, to be encoded without special
   tokens and freed by anybit_free. */
char* anybit_render_chat(const anybit_engine* engine, const char* const* roles,
                         const char* const* contents, size_t count, int generation_prompt,
                         char** error);

/* Takes a request; nothing that it points to but `user` is needed afterwards. To be released by
   anybit_release. */
anybit_handle* anybit_submit(anybit_engine* engine, const anybit_request* request, char** error);
/* Ends a request before its next token. */
void anybit_cancel(anybit_handle* handle);
/* Waits for the end; 0, or -1 on the engine's own thread. finish may be null, else its size must be
   set. */
int anybit_wait(anybit_handle* handle, anybit_finish* finish, char** error);
/* Frees a handle; its request goes on. Null is let pass. */
void anybit_release(anybit_handle* handle);

/* Frees a text of this library. Null is let pass. */
void anybit_free(char* text);

#ifdef __GNUC__
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
#endif
