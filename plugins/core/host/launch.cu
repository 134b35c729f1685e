// The token kernels' entry points: checks the shape and picks the kernel.
// Compiles with nvcc and with g++.
#include "core/device/prepare.cuh"

namespace anybit {
namespace {

constexpr int kMaxSize = 1 << 27;  // of m and k, so that row and word numbers fit 32 bits
// up to half as many tokens are shared out to several blocks each
constexpr int kSpreadBlocks = 64;
constexpr int kWarpsOfAShare = 4;  // one for each scheduler of a multiprocessor

int group_len(const PrepareShape& s) { return s.group_size ? s.group_size : s.k; }
int group_words(const PrepareShape& s) { return ceil_div(group_len(s), 32); }
int used_words(const PrepareShape& s) { return s.k / group_len(s) * group_words(s); }
int rows_per_token(const PrepareShape& s) {
  return s.order != kBitPlanes ? 1 : s.abits <= 2 ? 2 : s.abits <= 4 ? 4 : 8;
}
int words_per_chunk(const PrepareShape& s) {
  return s.order == kBitPlanes ? 32 : s.order == kSlotFloats ? 2 : 4;
}

// Lanes of a warp that always share a group.
int sum_lanes(const PrepareShape& s) {
  int lanes = 1;
  while (lanes < 32 && (group_len(s) == s.k || group_words(s) % (2 * lanes) == 0)) lanes *= 2;
  return lanes;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

PrepareArgs args_from(const PrepareShape& s, const void* x, const NormBuffers& norm,
                      const Tokens& tokens) {
  PrepareArgs p = {};
  p.x = x, p.norm = norm, p.epsilon = s.epsilon, p.k = s.k;
  p.row = {s.k / group_len(s), group_len(s), group_words(s)};
  p.words = token_chunks(s) * words_per_chunk(s);
  p.unit_words = s.unit_words, p.abits = s.abits, p.rows_per_token = rows_per_token(s);
  p.sum_lanes = sum_lanes(s), p.symmetric = s.act_symmetric != 0;
  p.vectors = size_t(p.row.group_len) * (s.dtype == kFloat32 ? 4 : 2) % 16 == 0 && aligned(x) &&
              aligned(norm.gamma) && aligned(norm.residual) && aligned(norm.residual_out);
  p.tokens = tokens, p.n_counters = s.n_counters;
  return p;
}

template <class T, TokenOrder kOrder>
cudaError_t run(const PrepareArgs& p, LaunchShape shape, cudaStream_t stream) {
  const int threads = round_up(p.words, 32);
  shape.block = dim3(threads < kMaxPrepareThreads<T> ? threads : kMaxPrepareThreads<T>);
  return p.norm.gamma ? launch(shape, stream, prepare_kernel<T, kOrder, true>, p)
                      : launch(shape, stream, prepare_kernel<T, kOrder, false>, p);
}

template <class T>
cudaError_t run_order(int32_t order, const PrepareArgs& p, const LaunchShape& shape,
                      cudaStream_t stream) {
  if (order == kNaturalCodes) return run<T, kNaturalCodes>(p, shape, stream);
  if (order == kSlotCodes) return run<T, kSlotCodes>(p, shape, stream);
  if (order == kBitPlanes) return run<T, kBitPlanes>(p, shape, stream);
  if constexpr (sizeof(T) == 2) return run<T, kSlotFloats>(p, shape, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

bool preparable(const PrepareShape& s) {
  if (s.m < 0 || s.m > kMaxSize || s.k < 1 || s.k > kMaxSize || s.n_counters < 0) return false;
  if (s.group_size < 0 || (s.group_size && s.k % s.group_size)) return false;
  if (s.dtype < kFloat16 || s.dtype > kFloat32) return false;
  if (s.order == kNaturalCodes && s.group_size) return false;
  if (s.order == kSlotCodes || s.order == kSlotFloats) {
    if (s.unit_words != 1 && s.unit_words != 2 && s.unit_words != 4) return false;
    if (group_len(s) != s.k && group_words(s) % s.unit_words) return false;
  }
  if (s.order == kSlotFloats) return s.abits == 16 && s.dtype != kFloat32;
  return s.order >= kNaturalCodes && s.order <= kBitPlanes && s.abits >= 2 && s.abits <= 8;
}

int token_row_count(const PrepareShape& s) {
  return round_up(s.m * rows_per_token(s), kTokenRowsMultiple);
}

int token_chunks(const PrepareShape& s) {  // whole units of up to 4 words as well
  const int multiple = words_per_chunk(s) < 4 ? 4 : words_per_chunk(s);
  return round_up(used_words(s), multiple) / words_per_chunk(s);
}

cudaError_t prepare_tokens(const PrepareShape& s, const void* x, const NormBuffers& norm,
                           const Tokens& tokens, bool overlap, cudaStream_t stream) {
  if (!preparable(s)) return cudaErrorInvalidValue;
  if (s.m == 0) return cudaSuccess;
  if (!x || !tokens.rows || (s.n_counters && !tokens.counters)) return cudaErrorInvalidValue;
  if (s.order != kSlotFloats && (!tokens.scale || !tokens.zero)) return cudaErrorInvalidValue;
  if ((norm.residual != nullptr) != (norm.residual_out != nullptr) ||
      (norm.residual && !norm.gamma))
    return cudaErrorInvalidValue;
  const PrepareArgs p = args_from(s, x, norm, tokens);
  int shares = ceil_div(p.words, 32 * kWarpsOfAShare);
  if (shares > kSpreadBlocks / s.m) shares = kSpreadBlocks / s.m;
  // one block zeroes a sum, then adds to it
  if (shares < 1 || (tokens.sums && p.row.group_words > p.sum_lanes)) shares = 1;
  const LaunchShape shape{dim3(s.m, shares), dim3(), kPrepareShared, overlap};
  return with_dtype(s.dtype,
                    [&](auto t) { return run_order<decltype(t)>(s.order, p, shape, stream); });
}

}  // namespace anybit

size_t anybit_prepare_rows(const PrepareShape* shape) {
  using namespace anybit;
  return preparable(*shape) ? size_t(token_chunks(*shape)) * token_row_count(*shape) * kChunkBytes
                            : 0;
}

int anybit_prepare_tokens(const PrepareShape* shape, const PrepareBuffers* b, void* cuda_stream) {
  using namespace anybit;
  if (!preparable(*shape)) return cudaErrorInvalidValue;
  Tokens tokens = {};
  tokens.rows = static_cast<uint8_t*>(b->rows), tokens.row_count = token_row_count(*shape);
  tokens.scale = b->scale, tokens.zero = b->zero, tokens.sums = b->sums,
  tokens.sum_pitch = shape->m, tokens.counters = b->counters;
  const NormBuffers norm = {b->gamma, b->residual, b->residual_out};
  return prepare_tokens(*shape, b->x, norm, tokens, false, static_cast<cudaStream_t>(cuda_stream));
}
