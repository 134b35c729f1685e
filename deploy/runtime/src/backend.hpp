// What the engine asks of whatever computes the model: one call at a time on rows of new tokens.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace anybit {

// New tokens of one slot in a call.
struct Row {
  int slot = 0;
  const int32_t* tokens = nullptr;
  int count = 0;
  int filled = 0;  // tokens of the slot's cache that these follow; what lies behind is forgotten
};

// Used by one thread at a time.
class Backend {
 public:
  virtual ~Backend() = default;

  // Most rows in one call.
  virtual int most_rows() const = 0;

  // Computes one call and extends the rows' caches.
  //
  // rows: of consecutive slots, with equally many tokens.
  // logits: whether those behind each row's last token are wanted.
  //
  // Returns them, [rows, vocab], which stay until the next call; null where they are not wanted.
  // Throws Error: the call failed. The rows' caches must not be relied on then, the others are whole.
  virtual const float* forward(const std::vector<Row>& rows, bool logits) = 0;

  // Why no call can succeed any more, such as a lost device; "" while they can.
  virtual std::string lost() const { return ""; }
};

}  // namespace anybit
