// The C interface of attention with its cache, which plugins/cached_attention/README.md describes.
#pragma once
#include "core/cpu/parallel.h"
#include "core/host/params.h"

// One call. Rows of a cache are the tokens of one sequence and one key-value head.
struct AttentionShape {
  int32_t batch;
  int32_t heads;     // of queries
  int32_t kv_heads;  // each serves heads / kv_heads query heads
  int32_t head_dim;
  int32_t tokens;        // new ones of each sequence
  int32_t past;          // rows of the past; of a static cache its capacity
  int32_t static_cache;  // 1 = new rows go to write_indices; 0 = behind the past
  int32_t masks;         // sequences in the mask: 1 for all, or batch
  int32_t dtype;         // DType of queries, keys, values and context
  int32_t bits;          // of the cache, 2..8; 16 = it holds numbers of dtype
  float scale;           // of the scores
  float softcap;         // 0 = none

  int32_t present() const { return static_cache ? past : past + tokens; }
  bool low_bits() const { return bits != 16; }
};

struct AttentionBuffers {
  const void* query;             // [batch, heads, tokens, head_dim]
  const void* key;               // [batch, kv_heads, tokens, head_dim]
  const void* value;             // the same
  const void* past_key;          // [batch, kv_heads, past, head_dim], or int8 codes (codes.py)
  const void* past_value;        // the same
  const uint8_t* mask;           // [masks, tokens, present()]; 0 = not seen
  const int64_t* write_indices;  // [batch], or null
  void* context;                 // [batch, tokens, heads, head_dim]
  void* present_key;             // [batch, kv_heads, present(), head_dim]
  void* present_value;           // the same; each may be its past if the cache is static
  // of a cache of few bits: scale and zero point, [batch, kv_heads, past or present(), 2]
  const float* past_key_scale;
  const float* past_value_scale;
  float* present_key_scale;
  float* present_value_scale;
};

// Returns 0; kInvalid (core/cpu/op.h) for a refused shape or a missing buffer; kNoMemory.
//
// isa: an anybit::cpu::Isa that this machine has; below 0 the one that is chosen for the process.
// parallel: an anybit::cpu::Parallel, or null for the calling thread alone.
ANYBIT_API int anybit_attention(const AttentionShape* shape, const AttentionBuffers* buffers,
                                int32_t isa, const void* parallel);

namespace anybit::cpu {

constexpr int kNoMemory = 2;

// Memory of the calling thread, 64-byte aligned, that its next call for the same use may take; null
// if there is too little.
enum Use : int { kBlockMemory, kPartMemory };
void* thread_memory(Use use, size_t bytes);

using Attend = int (*)(const AttentionShape&, const AttentionBuffers&, const Parallel&);
int attend_portable(const AttentionShape&, const AttentionBuffers&, const Parallel&);
#if defined(__x86_64__)
int attend_avx2(const AttentionShape&, const AttentionBuffers&, const Parallel&);
int attend_avx512(const AttentionShape&, const AttentionBuffers&, const Parallel&);
#endif

}  // namespace anybit::cpu
