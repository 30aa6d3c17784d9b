// The CPU's leaves of the walk: each fills in a task's structure and gives its tasks to the threads.
#pragma once

#include <vector>

#include "extras.h"

#include "../walk.h"
#include "kernels.h"
#include "parallel.h"
#include "tiles.h"

namespace sdpo::cpu {

// z_y of each row in double; 0 where the target is in another slice.
void target_logits(const Call& call, double* out);

class Leaves {
 public:
  explicit Leaves(const Kernels& kernels, RowExtras* extras = nullptr) : on(kernels), row_extras(extras) {}

  // Before a forward: keep all blocks' sums, for `choose_tiles` after it. Before a backward: leave the others out.
  void keep_sums() { keeps_sums = true; }
  void choose_tiles(double tolerance, bool relative, const double* state, const Tiles& to) const;
  void take(const Tiles& some) { tiles = some; }

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
  const Unit* load_rows(const Matrix& from, Buffer<Unit>& copy) const;
  void start_hidden_gradient();
  void run_logits(Logits task, int64_t count);
  void add_listed_hidden_gradient(int64_t first, int64_t count, const Blocks& s);
  Lists lists_of(int64_t first, const Blocks& s) const;
  void sort_targets();
  Targets sorted_targets() const;
  double target_slope(double target_logit) const;
  void log_sums_online(const std::vector<int64_t>& rows, const Unit* x, const int64_t* targets, double* rest);

  const Kernels& on;
  RowExtras* row_extras;             // [N], or null: not wanted
  Buffer<BlockExtras> block_extras;  // [blocks][N]
  Buffer<float> target_z;            // [N]
  Call call{};
  int64_t n_rows = 0, x_units = 0, sum_stride = 0;
  const Unit* x = nullptr;  // [N][x_units]
  Buffer<Unit> x_copy;
  Matrix weight_hidden{};          // of Gradients
  const Unit* weight_x = nullptr;  // the same, as rows of units
  Buffer<Unit> weight_x_copy;
  const double* target_logits = nullptr;  // [N] z_y
  Buffer<double> own_target_logits;
  Buffer<float> shift;   // [N] k
  Buffer<double> total;  // [N] o
  Buffer<float> sums;    // [blocks][N] of a chunk, or of all chunks
  int64_t sums_size = 0;
  bool keeps_sums = false;
  int64_t sums_from = 0;  // where the last chunk's sums begin
  Tiles tiles{};          // which blocks of each row a backward takes; no bits: all
  RowLists lists;
  Buffer<float> hidden_sum;        // [N][sum_stride]
  Buffer<float> r;                 // [N]
  Buffer<float> t;                 // [N] coefficients of the targets
  std::vector<int64_t> by_target;  // [N] rows in the order of their targets, then of their numbers
  Buffer<Unit> scaled_x;           // panels of r ⊙ weight_x
  Buffer<char> scratch_s;
};

}  // namespace sdpo::cpu
