// Feeds tokens to the ONNX file and keeps the KV caches of its slots.
#include "onnxruntime/decoder.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

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
  // The inputs and outputs of a call by name, in any order.
  struct Call {
    std::vector<const char*> input_names, output_names;
    std::vector<const OrtValue*> inputs;
    std::vector<Value> owned, outputs;
    std::vector<std::vector<int64_t>> numbers;  // that inputs point to

    void input(const char* name, const OrtValue* value) {
      input_names.push_back(name);
      inputs.push_back(value);
    }
    void output(const char* name, Value value = {}) {
      output_names.push_back(name);
      outputs.push_back(std::move(value));
    }
  };

  void integers(Call& call, const char* name, std::vector<int64_t> numbers, int64_t rows,
                int64_t columns) const {
    // moving the outer vector leaves the inner ones where they are
    call.numbers.push_back(std::move(numbers));
    std::vector<int64_t>& kept = call.numbers.back();
    std::vector<int64_t> dims{rows};
    if (columns >= 0) dims.push_back(columns);
    call.owned.push_back(
        session_->tensor(kInt64, dims, kept.data(), kept.size() * sizeof(int64_t)));
    call.input(name, call.owned.back().get());
  }

  // input_ids [B, S], logits_indices [B, 1] and the output of logits, the first.
  Call begin(const std::vector<Row>& rows) const {
    const auto batch = static_cast<int64_t>(rows.size());
    const int64_t count = rows[0].count;
    Call call;
    std::vector<int64_t> ids;
    for (const Row& row : rows) ids.insert(ids.end(), row.tokens, row.tokens + row.count);
    integers(call, "input_ids", std::move(ids), batch, count);
    if (picks_logits_) {
      integers(call, "logits_indices", std::vector<int64_t>(rows.size(), count - 1), batch, 1);
    }
    call.output("logits");
    return call;
  }

  void run(Call& call) const {
    session_->run(call.input_names, call.inputs, call.output_names, call.outputs);
  }

  // [rows, vocab] of the rows' last tokens.
  const float* finish(Call& call, const std::vector<Row>& rows) {
    logits_ = std::move(call.outputs[0]);
    const auto batch = static_cast<int64_t>(rows.size());
    const int64_t count = picks_logits_ ? 1 : rows[0].count;
    const std::vector<int64_t> dims = session_->dims(logits_.get());
    if (dims != std::vector<int64_t>{batch, count, vocab_}) {
      throw Error(
          "logits",
          "got a tensor of another shape, expected [batch, tokens, " + std::to_string(vocab_) + "]",
          "The file is damaged or changed: export the model again");
    }
    const auto* all = static_cast<const float*>(session_->data(logits_.get()));
    if (count == 1 || batch == 1) return all + (count - 1) * vocab_;
    picked_.clear();
    for (int64_t row = 0; row < batch; ++row) {
      const float* last = all + ((row + 1) * count - 1) * vocab_;
      picked_.insert(picked_.end(), last, last + vocab_);
    }
    return picked_.data();
  }

  const std::unique_ptr<Session> session_;
  const std::vector<CacheTensor> tensors_;
  const bool picks_logits_;
  const int64_t vocab_;

 private:
  Value logits_;
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
    Call call = begin(rows);
    const int64_t total = row.filled + row.count;
    std::vector<int64_t> positions;
    for (int64_t position = row.filled; position < total; ++position) positions.push_back(position);
    integers(call, "attention_mask", std::vector<int64_t>(static_cast<size_t>(total), 1), 1, total);
    integers(call, "position_ids", std::move(positions), 1, row.count);
    cache.resize(tensors_.size());
    for (size_t i = 0; i < tensors_.size(); ++i) {
      cut(cache[i], tensors_[i], row.filled);
      call.input(tensors_[i].past.c_str(), cache[i].get());
      call.output(tensors_[i].present.c_str());
    }
    run(call);
    for (size_t i = 0; i < tensors_.size(); ++i) cache[i] = std::move(call.outputs[i + 1]);
    return logits ? finish(call, rows) : nullptr;
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
// any range of slots.
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
    const auto batch = static_cast<int64_t>(rows.size());
    Call call = begin(rows);
    std::vector<int64_t> filled;
    for (const Row& row : rows) filled.push_back(row.filled);
    integers(call, "write_indices", std::move(filled), batch, -1);
    see(rows[0].slot, rows.size());
    for (size_t i = 0; i < tensors_.size(); ++i) {
      call.input(tensors_[i].past.c_str(), views_[i].get());
      call.output(tensors_[i].present.c_str(), std::move(views_[i]));
    }
    seen_ = 0;  // of no rows while the call has them
    run(call);
    for (size_t i = 0; i < tensors_.size(); ++i) views_[i] = std::move(call.outputs[i + 1]);
    seen_ = rows.size();
    return logits ? finish(call, rows) : nullptr;
  }

 private:
  // Makes views_ of so many slots from one on, which are the same from call to call in most.
  void see(int slot, size_t rows) {
    if (slot == slot_ && rows == seen_) return;
    views_.clear();
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const size_t bytes = tensors_[i].bytes(capacity_);
      const auto batch = static_cast<int64_t>(rows);
      views_.push_back(session_->tensor(tensors_[i].type, tensors_[i].shape(batch, capacity_),
                                        buffers_[i].data() + bytes * static_cast<size_t>(slot),
                                        bytes * rows));
    }
    slot_ = slot, seen_ = rows;
  }

  const int slots_;
  const int64_t capacity_;
  std::vector<Buffer> buffers_;  // [tensors][slots, heads, capacity, width]
  std::vector<Value> views_;     // [tensors][seen_, heads, capacity, width], from slot_ on
  int slot_ = 0;
  size_t seen_ = 0;
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
