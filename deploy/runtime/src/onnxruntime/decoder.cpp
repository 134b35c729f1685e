// Feeds tokens to the ONNX file and keeps the KV caches of its slots.
#include "onnxruntime/decoder.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>

#include "anybit/error.hpp"

namespace anybit::ort {
namespace {

// What both forms share: the inputs of a call that are small, and the logits.
class Decoder : public Backend {
 public:
  Decoder(std::unique_ptr<Session> session, const CacheForm& form, int vocab)
      : session_(std::move(session)),
        tensors_(form.tensors),
        picks_logits_(form.picks_logits),
        vocab_(vocab) {}

 protected:
  // The inputs and outputs of a call by name, in any order but for the logits, the first output.
  struct Call {
    std::vector<const char*> input_names, output_names;
    std::vector<const OrtValue*> inputs;
    std::vector<Value> owned, outputs;
    std::vector<int64_t> ids, places;  // that inputs point to, as do those of a form

    void input(const char* name, const OrtValue* value) {
      input_names.push_back(name);
      inputs.push_back(value);
    }
    void input(const char* name, Value value) {
      input(name, value.get());
      owned.push_back(std::move(value));
    }
    void output(const char* name, Value value = {}) {
      output_names.push_back(name);
      outputs.push_back(std::move(value));
    }
  };

  // A tensor of numbers that must stay where they are.
  Value integers(std::vector<int64_t>& numbers, const std::vector<int64_t>& dims) const {
    return session_->tensor(kInt64, dims, numbers.data(), numbers.size() * sizeof(int64_t));
  }

  // input_ids [B, S] and logits_indices [B, 1], for rows like these.
  void begin(Call& call, const std::vector<Row>& rows) const {
    const auto batch = static_cast<int64_t>(rows.size());
    const int64_t count = rows[0].count;
    call.ids.resize(static_cast<size_t>(batch * count));
    call.input("input_ids", integers(call.ids, {batch, count}));
    if (!picks_logits_) return;
    call.places.assign(rows.size(), count - 1);
    call.input("logits_indices", integers(call.places, {batch, 1}));
  }

  static void write_ids(Call& call, const std::vector<Row>& rows) {
    auto to = call.ids.begin();
    for (const Row& row : rows) to = std::copy(row.tokens, row.tokens + row.count, to);
  }

  void run(Call& call) const {
    session_->run(call.input_names, call.inputs, call.output_names, call.outputs);
  }

  // Tokens of each row whose logits a call computes.
  int64_t with_logits(const std::vector<Row>& rows) const {
    return picks_logits_ ? 1 : rows[0].count;
  }

  // [rows, vocab] of the rows' last tokens.
  const float* last_logits(const float* all, const std::vector<Row>& rows) {
    const int64_t count = with_logits(rows);
    if (count == 1 || rows.size() == 1) return all + (count - 1) * vocab_;
    picked_.clear();
    for (size_t row = 0; row < rows.size(); ++row) {
      const float* last = all + (static_cast<int64_t>(row + 1) * count - 1) * vocab_;
      picked_.insert(picked_.end(), last, last + vocab_);
    }
    return picked_.data();
  }

  const std::unique_ptr<Session> session_;
  const std::vector<CacheTensor> tensors_;
  const bool picks_logits_;
  const int64_t vocab_;

 private:
  std::vector<float> picked_;
};

// Each slot has tensors of its own, which the graph copies into longer ones in each call; so each
// call computes one slot, and no row depends on others.
class ConcatDecoder : public Decoder {
 public:
  ConcatDecoder(std::unique_ptr<Session> session, const CacheForm& form, int slots, int vocab)
      : Decoder(std::move(session), form, vocab), caches_(static_cast<size_t>(slots)) {}

  int most_rows() const override { return 1; }

  const float* forward(const std::vector<Row>& rows, bool logits) override {
    const Row& row = rows[0];
    std::vector<Value>& cache = caches_[static_cast<size_t>(row.slot)];
    Call call;
    begin(call, rows);
    write_ids(call, rows);
    const int64_t total = row.filled + row.count;
    std::vector<int64_t> mask(static_cast<size_t>(total), 1);
    std::vector<int64_t> positions(static_cast<size_t>(row.count));
    std::iota(positions.begin(), positions.end(), row.filled);
    call.input("attention_mask", integers(mask, {1, total}));
    call.input("position_ids", integers(positions, {1, row.count}));
    call.output("logits");
    cache.resize(tensors_.size());
    for (size_t i = 0; i < tensors_.size(); ++i) {
      cut(cache[i], tensors_[i], row.filled);
      call.input(tensors_[i].past.c_str(), cache[i].get());
      call.output(tensors_[i].present.c_str());
    }
    logits_.reset();  // not beside new ones
    run(call);
    for (size_t i = 0; i < tensors_.size(); ++i) cache[i] = std::move(call.outputs[i + 1]);
    logits_ = std::move(call.outputs[0]);
    if (session_->dims(logits_.get()) != std::vector<int64_t>{1, with_logits(rows), vocab_}) {
      throw Error(
          "logits",
          "got a tensor of another shape, expected [batch, tokens, " + std::to_string(vocab_) + "]",
          "The file is damaged or changed: export the model again");
    }
    if (!logits) return nullptr;
    return last_logits(static_cast<const float*>(session_->data(logits_.get())), rows);
  }

 private:
  // Leaves the first `filled` tokens of a slot's tensor.
  void cut(Value& value, const CacheTensor& tensor, int64_t filled) const {
    const int64_t had = value ? session_->dims(value.get())[CacheTensor::kTokens] : 0;
    if (value && had == filled) return;
    Value shorter = session_->tensor(tensor.type, tensor.shape(1, filled));
    if (filled > 0) {
      const auto heads = static_cast<size_t>(tensor.dims[1]);
      const size_t from = tensor.bytes(had) / heads, to = tensor.bytes(filled) / heads;
      const auto* source = static_cast<const char*>(session_->data(value.get()));
      auto* target = static_cast<char*>(session_->data(shorter.get()));
      for (size_t head = 0; head < heads; ++head) {
        memcpy(target + head * to, source + head * from, to);
      }
    }
    value = std::move(shorter);
  }

  std::vector<std::vector<Value>> caches_;  // [slots][tensors], null before the first call
  Value logits_;
};

// Zeroed memory that takes room as it is written. Each tensor begins at a page.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) {
      throw Error("the KV cache",
                  "got " + std::string(strerror(errno)) + " for " + std::to_string(bytes) +
                      " bytes, expected memory for all slots",
                  "Load with fewer slots, or export with a smaller capacity");
    }
  }
  ~Buffer() {
    if (data_ != MAP_FAILED) munmap(data_, bytes_);
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = MAP_FAILED;
  }
  Buffer& operator=(Buffer&&) = delete;

  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
  size_t bytes_;
};

// All slots are rows of one buffer for each tensor; a call writes the new rows in place and computes
// any range of slots. From call to call mostly numbers change: what is bound to them stays.
class StaticDecoder : public Decoder {
 public:
  StaticDecoder(std::unique_ptr<Session> session, const CacheForm& form, int slots, int vocab)
      : Decoder(std::move(session), form, vocab), slots_(slots), capacity_(form.capacity) {
    for (const CacheTensor& tensor : tensors_) {
      buffers_.emplace_back(tensor.bytes(capacity_) * static_cast<size_t>(slots));
    }
  }

  int most_rows() const override { return slots_; }

  const float* forward(const std::vector<Row>& rows, bool logits) override {
    if (rows[0].slot != slot_ || rows.size() != filled_.size() || rows[0].count != count_) {
      bind(rows);
    }
    write_ids(call_, rows);
    for (size_t i = 0; i < rows.size(); ++i) filled_[i] = rows[i].filled;
    run(call_);
    return logits ? last_logits(logits_.data(), rows) : nullptr;
  }

 private:
  // Makes the call for so many tokens of so many slots from one on.
  void bind(const std::vector<Row>& rows) {
    count_ = 0;  // of no rows, should this fail
    call_ = {};
    begin(call_, rows);
    const auto batch = static_cast<int64_t>(rows.size());
    filled_.resize(rows.size());
    call_.input("write_indices", integers(filled_, {batch}));
    const std::vector<int64_t> dims{batch, with_logits(rows), vocab_};
    const auto numbers = static_cast<size_t>(dims[0] * dims[1] * dims[2]);
    if (numbers > logits_.capacity())
      std::vector<float>().swap(logits_);  // not beside a larger one
    logits_.resize(numbers);
    call_.output("logits",
                 session_->tensor(kFloat, dims, logits_.data(), logits_.size() * sizeof(float)));
    slot_ = rows[0].slot;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const size_t bytes = tensors_[i].bytes(capacity_);
      Value view = session_->tensor(tensors_[i].type, tensors_[i].shape(batch, capacity_),
                                    buffers_[i].data() + bytes * static_cast<size_t>(slot_),
                                    bytes * rows.size());
      call_.input(tensors_[i].past.c_str(), view.get());
      call_.output(tensors_[i].present.c_str(), std::move(view));
    }
    count_ = rows[0].count;
  }

  const int slots_;
  const int64_t capacity_;
  std::vector<Buffer> buffers_;  // [tensors][slots, heads, capacity, width]
  Call call_;                    // of filled_.size() slots from slot_ on, with count_ tokens each
  std::vector<int64_t> filled_;
  int slot_ = 0, count_ = 0;
  std::vector<float> logits_;
};

}  // namespace

std::unique_ptr<Backend> make_backend(std::unique_ptr<Session> session, const CacheForm& form,
                                      int slots, int vocab) {
  if (form.is_static) {
    return std::make_unique<StaticDecoder>(std::move(session), form, slots, vocab);
  }
  return std::make_unique<ConcatDecoder>(std::move(session), form, slots, vocab);
}

}  // namespace anybit::ort
