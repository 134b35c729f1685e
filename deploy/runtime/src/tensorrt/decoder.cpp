// Feeds tokens to the engine and keeps the KV caches of its slots in the GPU's memory.
#include "tensorrt/decoder.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <tuple>
#include <utility>

#include "anybit/error.hpp"

namespace anybit::trt {
namespace {

constexpr int kThreadLocal = 1;  // CUstreamCaptureMode: what other threads do is not looked at
constexpr size_t kMostGraphs = 32;

// What both forms share: small inputs and logits, in host memory and on the GPU.
class Decoder : public Backend {
 public:
  Decoder(std::unique_ptr<cuda::Driver> driver, std::unique_ptr<Api> api,
          std::unique_ptr<Engine> engine, const CacheForm& form, const Sizes& sizes)
      : driver_(std::move(driver)),
        api_(std::move(api)),
        engine_(std::move(engine)),
        form_(form),
        sizes_(sizes),
        stream_(cuda::create_stream(*driver_)),
        working_(cuda::allocate(*driver_, sizes.working)),
        small_bytes_(small_offset(3)),
        host_small_(cuda::allocate_host(*driver_, small_bytes_)),
        small_(cuda::allocate(*driver_, small_bytes_)),
        logits_bytes_(sizeof(float) * static_cast<size_t>(sizes.vocab)),
        host_logits_(cuda::allocate_host(*driver_, logits_bytes_ * rows())),
        logits_(cuda::allocate(*driver_, logits_bytes_ * rows())),
        prefill_(context(Profile::kPrefill)),
        decode_(context(Profile::kDecode)) {}

  int most_rows() const override { return sizes_.rows; }

  const float* forward(const std::vector<Row>& rows, bool logits) override {
    try {
      driver_->use();
      step(rows, logits);
      return logits ? static_cast<const float*>(host_logits_.get()) : nullptr;
    } catch (...) {
      driver_->wait.quietly(stream_.get());  // so that nothing is written any more
      lost_ = driver_->lost();
      forget();
      throw;
    }
  }

  std::string lost() const override { return lost_; }

 protected:
  virtual void step(const std::vector<Row>& rows, bool logits) = 0;
  // After a failure: what was set or recorded may not be as it seems.
  virtual void forget() {}

  // Before anything is freed: the thread that ends a model need not be the one that ran it.
  void use_to_free() noexcept {
    try {
      kept_.emplace(*driver_);
      driver_->use();
    } catch (const std::exception&) {  // of a lost GPU there is nothing to free
    }
  }

  size_t rows() const { return static_cast<size_t>(sizes_.rows); }

  Context context(Profile profile) const {
    return engine_->context(profile, working_.get(), sizes_.working, stream_.get());
  }

  Context& context_for(const std::vector<Row>& rows) {
    return rows[0].count == 1 ? decode_ : prefill_;
  }

  // The inputs of a step lie behind each other: logits_indices [B, 1], where the form has its own
  // [B] or [B, S] (write_indices or position_ids), input_ids [B, S].
  size_t small_offset(int which) const {
    const size_t tokens = rows() * static_cast<size_t>(sizes_.chunk);
    const size_t sizes[] = {aligned(rows() * sizeof(int64_t)), aligned(tokens * sizeof(int64_t)),
                            aligned(tokens * sizeof(int64_t))};
    size_t offset = 0;
    for (int i = 0; i < which; ++i) offset += sizes[i];
    return offset;
  }
  int64_t* small_host(int which) const {
    return reinterpret_cast<int64_t*>(static_cast<char*>(host_small_.get()) + small_offset(which));
  }
  cuda::Address small_address(int which) const { return small_.get() + small_offset(which); }

  // Writes what both forms have in host memory.
  void write(const std::vector<Row>& rows) const {
    int64_t *indices = small_host(0), *ids = small_host(2);
    for (const Row& row : rows) {
      *indices++ = row.count - 1;
      ids = std::copy(row.tokens, row.tokens + row.count, ids);
    }
  }

  void bind(Context& context, int64_t batch, int64_t count) const {
    context.shape("input_ids", {batch, count});
    context.shape("logits_indices", {batch, 1});
    context.address("input_ids", small_address(2));
    context.address("logits_indices", small_address(0));
    context.address("logits", logits_.get());
  }

  // Inputs there, the step, logits back: all in the stream's order, none of it waited for.
  void queue(Context& context, size_t batch, size_t count, bool logits) const {
    const size_t used = small_offset(2) + batch * count * sizeof(int64_t);
    driver_->upload(small_.get(), host_small_.get(), used, stream_.get());
    context.enqueue(stream_.get());
    if (logits) {
      driver_->download(host_logits_.get(), logits_.get(), logits_bytes_ * batch, stream_.get());
    }
  }

  void wait() const { driver_->wait(stream_.get()); }

  // In this order: what is last goes first.
  std::optional<cuda::KeptContext> kept_;  // of the thread that frees what follows
  const std::unique_ptr<cuda::Driver> driver_;
  const std::unique_ptr<Api> api_;
  const std::unique_ptr<Engine> engine_;
  const CacheForm form_;
  const Sizes sizes_;
  const cuda::OwnedStream stream_;
  const cuda::Memory working_;  // of all contexts, as only one computes at a time
  const size_t small_bytes_;
  const cuda::HostMemory host_small_;
  const cuda::Memory small_;
  const size_t logits_bytes_;  // of a row
  const cuda::HostMemory host_logits_;
  const cuda::Memory logits_;
  Context prefill_, decode_;

 private:
  std::string lost_;
};

// Each slot has memory of its own, from which a step copies into a spare one; then the two change
// places.
class ConcatDecoder final : public Decoder {
 public:
  ConcatDecoder(std::unique_ptr<cuda::Driver> driver, std::unique_ptr<Api> api,
                std::unique_ptr<Engine> engine, const CacheForm& form, const Sizes& sizes)
      : Decoder(std::move(driver), std::move(api), std::move(engine), form, sizes),
        slots_(static_cast<size_t>(sizes.slots)) {
    for (Cache& slot : slots_) slot = allocate();
    spare_ = allocate();
    const std::vector<int64_t> ones(static_cast<size_t>(sizes.context), 1);
    mask_ = cuda::allocate(*driver_, ones.size() * sizeof(int64_t));
    driver_->upload(mask_.get(), ones.data(), ones.size() * sizeof(int64_t), stream_.get());
    wait();
  }
  ~ConcatDecoder() override { use_to_free(); }

 private:
  struct Cache {
    std::vector<cuda::Memory> tensors;
    int64_t tokens = 0;  // as they lie there, [heads, tokens, width]
  };

  Cache allocate() const {
    Cache made;
    for (const CacheTensor& tensor : form_.tensors) {
      made.tensors.push_back(cuda::allocate(*driver_, tensor.bytes(sizes_.context)));
    }
    return made;
  }

  void step(const std::vector<Row>& rows, bool logits) override {
    const Row& row = rows[0];
    Cache& cache = slots_[static_cast<size_t>(row.slot)];
    cut(cache, row.filled);
    write(rows);
    const int64_t total = row.filled + row.count;
    for (int64_t i = 0; i < row.count; ++i) small_host(1)[i] = row.filled + i;
    Context& context = context_for(rows);
    bind(context, 1, row.count);
    context.shape("attention_mask", {1, total});
    context.shape("position_ids", {1, row.count});
    context.address("attention_mask", mask_.get());
    context.address("position_ids", small_address(1));
    for (size_t i = 0; i < form_.tensors.size(); ++i) {
      const CacheTensor& tensor = form_.tensors[i];
      context.shape(tensor.past, tensor.shape(1, row.filled));
      context.address(tensor.past, cache.tensors[i].get());
      context.address(tensor.present, spare_.tensors[i].get());
    }
    queue(context, 1, static_cast<size_t>(row.count), logits);
    wait();
    std::swap(cache, spare_);
    cache.tokens = total;
  }

  // Leaves the first `filled` tokens of a slot.
  void cut(Cache& cache, int64_t filled) {
    if (cache.tokens == filled) return;
    for (size_t i = 0; i < form_.tensors.size() && filled > 0; ++i) {
      const auto heads = static_cast<size_t>(form_.tensors[i].dims[1]);
      const size_t from = form_.tensors[i].bytes(cache.tokens) / heads;
      const size_t to = form_.tensors[i].bytes(filled) / heads;
      for (size_t head = 0; head < heads; ++head) {
        driver_->copy(spare_.tensors[i].get() + head * to, cache.tensors[i].get() + head * from, to,
                      stream_.get());
      }
    }
    std::swap(cache, spare_);
    cache.tokens = filled;
  }

  std::vector<Cache> slots_;
  Cache spare_;
  cuda::Memory mask_;  // ones, for as many tokens as a slot can have
};

// All slots are rows of one buffer for each tensor, which a step writes in place. Steps of one new
// token have the same shapes each time, so they are recorded once and replayed.
class StaticDecoder final : public Decoder {
 public:
  StaticDecoder(std::unique_ptr<cuda::Driver> driver, std::unique_ptr<Api> api,
                std::unique_ptr<Engine> engine, const CacheForm& form, const Sizes& sizes,
                bool graphs)
      : Decoder(std::move(driver), std::move(api), std::move(engine), form, sizes),
        no_graphs_(graphs ? "" : "turned off") {
    for (const CacheTensor& tensor : form_.tensors) {
      const size_t bytes = stride(tensor) * static_cast<size_t>(sizes.slots);
      buffers_.push_back(cuda::allocate(*driver_, bytes));
      driver_->fill(buffers_.back().get(), 0, bytes, stream_.get());
    }
    wait();
  }
  ~StaticDecoder() override { use_to_free(); }

  const std::string& no_graphs() const { return no_graphs_; }

  // Bytes for all ranges of slots that can be recorded, or as many as are kept.
  size_t most_for_graphs() const {
    if (recorded_.empty()) return 0;
    const auto slots = static_cast<size_t>(sizes_.slots);
    size_t ranges = 0;
    for (size_t length = 1; length <= rows(); ++length) ranges += slots - length + 1;
    return std::min(std::min(ranges, kMostGraphs) * graph_bytes_, sizes_.graphs);
  }

 private:
  // Whose cache a context has been told to use.
  struct Key {
    int slot = -1, rows = 0, count = 0;
    bool operator<(const Key& other) const {
      return std::tie(slot, rows, count) < std::tie(other.slot, other.rows, other.count);
    }
    bool operator==(const Key& other) const { return !(*this < other) && !(other < *this); }
  };
  // TensorRT: a recorded step holds as long as nothing is set in its context any more.
  struct Recorded {
    Context context;
    cuda::OwnedExec exec;
  };

  size_t stride(const CacheTensor& tensor) const { return aligned(tensor.bytes(form_.capacity)); }

  void step(const std::vector<Row>& rows, bool logits) override {
    write(rows);
    for (size_t i = 0; i < rows.size(); ++i) small_host(1)[i] = rows[i].filled;
    const Key key{rows[0].slot, static_cast<int>(rows.size()), rows[0].count};
    const bool repeats = key.count == 1 && logits && no_graphs_.empty();
    const auto found = repeats ? recorded_.find(key) : recorded_.end();
    if (found != recorded_.end()) {
      driver_->launch(found->second.exec.get(), stream_.get());
      return wait();
    }
    if (repeats && recorded_.size() < kMostGraphs && graph_bytes_ <= sizes_.graphs - taken_) {
      const size_t free = free_memory();
      std::optional<Context> own = own_context();
      if (own) return run_and_record(key, std::move(*own), free - std::min(free, free_memory()));
    }
    Context& context = context_for(rows);
    Key& bound = key.count == 1 ? decode_bound_ : prefill_bound_;
    if (!(bound == key)) bind_all(context, key);
    bound = key;
    queue(context, rows.size(), static_cast<size_t>(key.count), logits);
    wait();
  }

  void forget() override {
    drop_recorded();
    decode_bound_ = prefill_bound_ = {};
  }

  void bind_all(Context& context, const Key& key) {
    bind(context, key.rows, key.count);
    context.shape("write_indices", {key.rows});
    context.address("write_indices", small_address(1));
    for (size_t i = 0; i < form_.tensors.size(); ++i) {
      const CacheTensor& tensor = form_.tensors[i];
      const cuda::Address rows_of =
          buffers_[i].get() + stride(tensor) * static_cast<size_t>(key.slot);
      context.shape(tensor.past, tensor.shape(key.rows, form_.capacity));
      context.address(tensor.past, rows_of);
      context.address(tensor.present, rows_of);
    }
  }

  // For a step that is recorded. Nothing where the GPU has no memory for one more: steps then run as
  // they come, which needs none.
  std::optional<Context> own_context() {
    try {
      return context(Profile::kDecode);
    } catch (const Error& error) {
      record_no_more(error);
      return {};
    }
  }

  void record_no_more(const Error& why) {
    no_graphs_ = why.what();
    drop_recorded();
  }

  void drop_recorded() {
    recorded_.clear();
    taken_ = 0;
  }

  // Of the GPU; 0 where it does not say, and then what is recorded seems to take nothing.
  size_t free_memory() const noexcept {
    try {
      return driver_->free_memory();
    } catch (const Error&) {
      return 0;
    }
  }

  // TensorRT wants a step to have run before it is recorded: that is the one that was asked for.
  // Where recording fails, or took more than there is room for, its result holds, and later ones run
  // as they come.
  //
  // bytes: that the context took. What the first run loads is not counted: it is there once.
  void run_and_record(const Key& key, Context own, size_t bytes) {
    bind_all(own, key);
    const auto batch = static_cast<size_t>(key.rows);
    queue(own, batch, 1, true);
    wait();
    try {
      const size_t free = free_memory();
      cuda::OwnedExec exec = record(own, batch);
      bytes += free - std::min(free, free_memory());
      graph_bytes_ = std::max(graph_bytes_, bytes);
      if (bytes <= sizes_.graphs - taken_) {
        taken_ += bytes;
        recorded_.insert_or_assign(key, Recorded{std::move(own), std::move(exec)});
      } else if (recorded_.empty()) {
        record_no_more(Error("CUDA graphs",
                             "got " + std::to_string(sizes_.graphs) +
                                 " bytes that the plan leaves, expected " + std::to_string(bytes) +
                                 " for one",
                             "Allow more memory, or fewer slots"));
      }
    } catch (const Error& error) {
      record_no_more(error);
    }
  }

  cuda::OwnedExec record(Context& own, size_t batch) const {
    driver_->begin_capture(stream_.get(), kThreadLocal);
    cuda::Graph graph = nullptr;
    try {
      queue(own, batch, 1, true);
    } catch (...) {
      driver_->end_capture.quietly(stream_.get(), &graph);
      const cuda::OwnedGraph dropped(*driver_, graph);
      throw;
    }
    driver_->end_capture(stream_.get(), &graph);
    const cuda::OwnedGraph owned(*driver_, graph);
    cuda::GraphExec exec = nullptr;
    driver_->instantiate(&exec, graph, 0);
    return {*driver_, exec};
  }

  std::vector<cuda::Memory> buffers_;  // [tensors][slots, heads, capacity, width]
  Key prefill_bound_, decode_bound_;
  std::string no_graphs_;
  std::map<Key, Recorded> recorded_;
  size_t graph_bytes_ = 0;  // of the largest of them
  size_t taken_ = 0;        // by all of them, at most sizes_.graphs
};

}  // namespace

Running make_backend(std::unique_ptr<cuda::Driver> driver, std::unique_ptr<Api> api,
                     std::unique_ptr<Engine> engine, const CacheForm& form, const Sizes& sizes,
                     bool graphs) {
  constexpr int32_t kAnything = 0;
  const std::vector<Row> one{{0, &kAnything, 1, 0}};
  if (!form.is_static) {
    auto made = std::make_unique<ConcatDecoder>(std::move(driver), std::move(api),
                                                std::move(engine), form, sizes);
    made->forward(one, true);
    return {std::move(made), 0, "its cache grows"};
  }
  auto made = std::make_unique<StaticDecoder>(std::move(driver), std::move(api), std::move(engine),
                                              form, sizes, graphs);
  made->forward(one, true);
  std::string no_graphs = made->no_graphs();
  const size_t graph_bytes = made->most_for_graphs();
  return {std::move(made), graph_bytes, std::move(no_graphs)};
}

}  // namespace anybit::trt
