// The CUDA kernels' interface for the host: one launcher per kernel, on a stream, without torch. Sizes of 0 launch
// nothing; every launcher throws std::runtime_error if CUDA reports an error.
#pragma once

#include <string>

#include "../call.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // as in cuda_runtime_api.h

namespace sdpo::cuda {

// Why the current device cannot run these kernels: a driver that is too old, a chip they are not built for; "" if it
// can.
std::string why_not();

constexpr int64_t SLAB = 8192;  // columns that one block sums for a row

// Logits of some columns, in float: E, S and row sums in one read.
struct Chunk {
  const float* products;   // [N, padded] x·w
  int64_t n_rows, padded;  // a row's elements; a multiple of 64
  int64_t first, columns;  // of the vocabulary, without padding
  const float* bias;       // [V] or null
  const int64_t* targets;  // [N]
  const float* shift;      // [N] k
  Head head;
  float* sums;  // [slabs, N], or null
  void* s;      // [N, …] S of these columns, `padded` of them; null: not wanted
  int64_t s_stride;
  bool bf16;  // S in bfloat16
};
void exp_rows(const Chunk& chunk, cudaStream_t stream);

// total[i] += Σ over slabs of sums[slab][i].
void add_sums(const float* sums, int64_t slabs, int64_t n_rows, double* total, cudaStream_t stream);

// z_y in double, by a dot product of its own; 0 where the target is in another slice.
void target_logits(const Call& call, double* target_logits, cudaStream_t stream);
// k in float, and a total of 0.
void begin_rows(const double* target_logits, int64_t n_rows, float* shift, double* total, cudaStream_t stream);

void finish_rows(bool slice, const double* total, const double* target_logits, const float* shift, int64_t n_rows,
                 float* logps, double* state, cudaStream_t stream);

// Always launched, one block per row; rows in range return at once.
struct Redo {
  Call call;
  const double* total;
  const double* target_logits;
  float* logps;
  double* state;
  void* stash;  // [N, stash_stride] of `stash_columns` columns, or null
  int64_t stash_stride, stash_columns;
  float* hidden_sum;  // [N, H] or null
  bool bf16;
};
void redo_rows(const Redo& redo, cudaStream_t stream);

// r, k and t of a backward; `exact`: r is a power of 2.
struct RowFactors {
  float *r, *shift, *t;  // [N] each
  bool exact;
};
void begin_backward(const Call& call, const float* grad, const float* logps, const double* state,
                    const RowFactors& factors, cudaStream_t stream);

// rows [n_rows] in the order of their targets, and of their numbers where those are equal.
void sort_targets(const int64_t* targets, int64_t n_rows, int64_t* rows, cudaStream_t stream);
// Adds the targets' terms Yᵀ·(t ⊙ X) to rows `first` … `first + rows − 1` of dW:
//     out = sum + terms, sum [rows, H] of float, out of bfloat16
void finish_weight(const float* sum, const Targets& targets, const Matrix& x, int64_t first, int64_t rows,
                   uint16_t* out, cudaStream_t stream);
//     out += terms, out of float
void add_to_weight(const Targets& targets, const Matrix& x, int64_t first, int64_t rows, float* out,
                   cudaStream_t stream);

// Rows of `from` as bfloat16 or float, [rows, columns].
void convert_rows(const Matrix& from, void* out, bool bf16, cudaStream_t stream);
// out = r ⊙ x, out of x's type.
void scale_rows(const Matrix& x, const float* r, void* out, cudaStream_t stream);
// out = r ⊙ sum + t ⊙ W[y], [N, H], out of hidden's type.
void finish_hidden(const Call& call, const float* sum, const float* r, const float* t, void* out, cudaStream_t stream);
// sum += part.
void add(float* sum, const float* part, int64_t count, cudaStream_t stream);
// db_j = Σ_i r_i S_ij + Σ t_i of the rows with target j, for columns `first` … `first + columns − 1`.
void bias_gradient(const void* s, int64_t s_stride, bool bf16, const float* r, const Targets& targets, int64_t n_rows,
                   int64_t first, int64_t columns, float* out, cudaStream_t stream);
// d logp / d hidden from ΣS·W.
void finish_direction(const Call& call, const float* hidden_sum, const float* logps, const double* state,
                      float* direction, cudaStream_t stream);

// Existing logits, row by row.
void logits_forward(const Matrix& logits, const int64_t* targets, double temperature, float* logps, double* lse,
                    cudaStream_t stream);
void logits_backward(const Matrix& logits, const int64_t* targets, double temperature, const float* logps,
                     const double* lse, const float* grad, void* out, cudaStream_t stream);

struct Pairs {
  const float* logps;      // [n_rows] of tokens, or [2B] already summed
  const int64_t* index;    // [n_scored] rows to sum; null: logps are the sums
  const int64_t* segment;  // [n_scored] the sequence of each, ascending
  int64_t n_scored, n_pairs;
  const float* ref;       // [2B]
  const int64_t* counts;  // [2B] scored tokens
  int64_t loss;           // a PairLoss
  double beta, smoothing;
  float *out_loss, *sums, *metrics, *slopes;  // [1], [2B], [4][B], [2B]
};
void pair_epilogue(const Pairs& pairs, cudaStream_t stream);

}  // namespace sdpo::cuda
