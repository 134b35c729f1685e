// A callback that notes tokens and when they came. runtime.py's own would be one in Python, which takes
// longer than all that the engine does for a token.
#include <ctime>

#include "anybit/anybit.h"

struct TokenLog {
  double* times;  // seconds
  int32_t* tokens;
  size_t count;
};

extern "C" __attribute__((visibility("default"))) void note_token(void* user, int32_t token,
                                                                  const char*, size_t, float) {
  auto* log = static_cast<TokenLog*>(user);
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  log->times[log->count] =
      static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
  log->tokens[log->count++] = token;
}
