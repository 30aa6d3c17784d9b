// CUDA's leaves of the walk: each enqueues its launches and products on the current stream and waits for nothing.
// S is stored by rows, [N, columns], as cuBLAS reads it.
#pragma once

#include "../walk.h"
#include "host.h"
#include "kernels.h"

namespace sdpo::cuda {

class Leaves {
 public:
  Leaves(int device, bool bf16) : host(device), bf16(bf16) {}

  void begin_forward(const Call& call);
  void begin_backward(const Call& call, bool stashed, const float* logps, const double* state, const float* grad,
                      const Gradients&);

  // Blocks per chunk: with S stored or not; of a stash of `kept` blocks.
  int64_t chunk_blocks(bool stored) const;
  int64_t stash_blocks(int64_t kept) const;

  // Forward and backward.
  Blocks part(const Blocks& s, int64_t first) const;  // from block `first` on
  Blocks scratch_blocks(int64_t count);
  void logits(int64_t first, int64_t count, const Blocks& out);
  void add_hidden_gradient(int64_t first, int64_t count, const Blocks& s);

  // Forward.
  void add_sums(int64_t count);
  void finish_rows(float* logps, double* state);
  void redo_rows_out_of_range(const Kept& kept, float* logps, double* state);
  void finish_direction(const float* logps, const double* state, float* direction);

  // Backward.
  void weight_gradient(int64_t first, int64_t count, const Blocks& s, void* out);
  void bias_gradient(int64_t first, int64_t count, const Blocks& s, float* out);
  void finish_hidden_gradient(void* out);

 private:
  using Memory = std::shared_ptr<void>;

  void begin(const Call& call);
  Matrix converted(const Matrix& rows, Memory& copy);
  int64_t element() const { return bf16 ? 2 : 4; }
  int64_t columns_until(int64_t block) const { return std::min(block * PANEL, call.weight.rows); }
  int64_t columns_at_once(int64_t height) const;
  Targets sorted_targets() const { return {by_target, n_rows, call.targets, t}; }
  View rows_of_weight(int64_t first, int64_t count);  // [count, H] in the operands' type
  View view_of(const Blocks& s, int64_t columns) const;
  template <class T>
  T* vector(Memory& memory);  // [N] of T

  Host host;
  bool bf16;  // of the operands
  Call call{};
  int64_t n_rows = 0, width = 0;
  Matrix x{};         // [N, H] hidden in the operands' type
  Matrix weight_x{};  // [N, H'] those of its columns that dW is wanted for
  cudaStream_t stream = nullptr;
  int64_t slabs = 0;  // of the last chunk's sums
  bool started = false;
  const double* target_logits = nullptr;                            // [N] z_y
  double* total = nullptr;                                          // [N] o
  float* shift = nullptr;                                           // [N] k
  float *r = nullptr, *t = nullptr;                                 // [N]
  int64_t* by_target = nullptr;                                     // [N] rows in the order of their targets
  Memory x_copy, weight_x_copy, scaled_x, hidden_sum, hidden_part;  // [N, H], [N, H']
  Memory target_memory, total_memory, shift_memory, r_memory, t_memory, by_target_memory;
  Memory products, sums, scratch_s, weight_copy, weight_sum;
  int64_t sums_size = 0, weight_size = 0;
};

}  // namespace sdpo::cuda
