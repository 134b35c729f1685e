// An artifact, opened for running.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "anybit/chat.hpp"
#include "anybit/error.hpp"
#include "anybit/sampling.hpp"
#include "anybit/tokenizer.hpp"

#pragma GCC visibility push(default)
namespace anybit {

// How a model is opened.
struct LoadOptions {
  // "tensorrt": the engine on a GPU; "onnxruntime": the ONNX file on the CPU; "auto": the engine
  // where the folder has one and the machine a driver, a GPU and a TensorRT that fit it, else the ONNX
  // file.
  std::string backend = "auto";
  // How many requests run at once, 1 to 1024.
  int slots = 4;
  // Threads that compute; 0: one for each core that the process may use by its affinity and its
  // control groups.
  int threads = 0;
  // Most tokens in a slot, prompt and new ones, 2 or more; 0: as many as the model allows.
  int capacity = 0;
  // Most prompt tokens in one call of the model, 1 to 65536: bounds the memory of a call, and how
  // long a running request waits for another's prompt.
  int chunk = 256;
  // Bytes that MemoryPlan::total() may be; 0: what the machine, or the process's control groups,
  // have free.
  size_t memory_limit = 0;
  // Compare every file with its SHA-256, the weights too (about 3 s a GB). Sizes are compared in
  // any case, and so are the checksums of all files but the weights.
  bool verify = false;
  // The library libonnxruntime.so, or a folder that has it; empty: ANYBIT_ONNXRUNTIME of the
  // environment, else beside this library or program, else of the Python package onnxruntime in
  // VIRTUAL_ENV, CONDA_PREFIX, .venv beside that folder, /usr/local, /usr and ~/.local, else what the
  // system's linker finds.
  std::filesystem::path onnxruntime;
  // The native kernels, libanybit_onnxruntime.so, or a folder that has it; empty: ANYBIT_KERNELS of
  // the environment, else beside this library or program. "none": the custom nodes run as their
  // bodies of standard ops, which is much slower and takes memory that is not planned.
  std::filesystem::path kernels;
  // TensorRT's library (libnvinfer.so.10, libnvinfer.so.11 or libtensorrt_rtx.so.1), or a folder that
  // has it; empty: ANYBIT_TENSORRT of the environment, else as with ONNX Runtime, of the Python package
  // tensorrt or tensorrt-rtx. CUDA's driver library is the system's, or ANYBIT_CUDA of the environment.
  std::filesystem::path tensorrt;
  // Replay the steps of a static cache on the GPU as CUDA graphs; ANYBIT_CUDA_GRAPHS=0 in the
  // environment turns it off too.
  bool cuda_graphs = true;
};

// Bytes that a loaded model needs.
struct MemoryPlan {
  size_t weights = 0;  // mapped from the file: taken from the page cache, and given back at need
  size_t cache = 0;    // keys and values of all slots
  size_t second_cache = 0;  // the copy that a graph with a concatenated cache makes in each call
  size_t logits = 0;        // of the largest call
  size_t activations = 0;   // of the largest call, estimated
  size_t copies = 0;  // ONNX Runtime's own of float matrices, in fp32: a 16-bit head above all
  // Most that recorded steps and their contexts may take of a GPU: as many as are kept, as what the
  // first one took.
  size_t graphs = 0;
  size_t program = 0;  // ONNX Runtime itself, the graph and the tokenizer, estimated
  // All of it is the GPU's, and activations are what the engine says; else the machine's.
  bool on_gpu = false;
  size_t limit = 0;  // what all but the weights may take together
  // All but the weights.
  size_t total() const {
    return cache + second_cache + logits + activations + copies + graphs + program;
  }
  // One line for a log.
  std::string text() const;
};

// What a model is.
struct Card {
  std::string name, family, scheme, method;  // such as smollm2-135m, llama, w4a8, rtn
  std::string dtype;                         // of all that is not integer
  int kv_bits = 16;                          // of the numbers in the cache
  int layers = 0, hidden = 0, vocab = 0;
  int context = 0;      // tokens that the model was made for
  int max_context = 0;  // most tokens of a request here, prompt and new ones
  std::vector<int32_t> end_tokens;
  // How the model's makers want tokens to be chosen.
  Sampling sampling;
  std::string backend;     // such as "ONNX Runtime 1.31.1, native kernels"
  std::string choice;      // why "auto" chose it; "" where it was named
  std::string cache_form;  // "static": one buffer, in place; "concat": copied in each call
  int slots = 0;
  int threads = 0;        // that compute; 0 where a GPU does
  bool verified = false;  // whether the weights' checksum was compared
  // Of report/report.json beside the model: "passed", "failed", or "unknown" where there is none.
  std::string proof = "unknown";
  MemoryPlan memory;
};

// An artifact, opened. Safe to share between threads.
class Model {
 public:
  // Opens an artifact.
  //
  // @param folder OUT of `python -m exporter`, or its onnx or engine folder alone.
  // Throws Error: a file is missing, damaged or of another version; the backend's library is missing
  // or too old, or refuses the graph; there is too little memory for the slots.
  static std::shared_ptr<Model> load(const std::filesystem::path& folder,
                                     const LoadOptions& options = {});

  const Card& card() const;

  // Throws Error, in every call, where the folder has no tokenizer that this library knows.
  const Tokenizer& tokenizer() const;

  // Throws Error where the folder has no chat template that can be said as data.
  const ChatTemplate& chat() const;

  struct Parts;
  explicit Model(std::unique_ptr<Parts> parts);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // For the engine.
  Parts& parts() const { return *parts_; }

 private:
  std::unique_ptr<Parts> parts_;
};

}  // namespace anybit
#pragma GCC visibility pop
