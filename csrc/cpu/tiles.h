// Which blocks of 64 columns of each row a backward takes: the rule of sdpo_kernels/backends/grad_tol.py.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace sdpo::cpu {

constexpr double TOLERANCE_MARGIN = 1.0 / 1024;  // of the tolerance, for the rounding of logits and sums
constexpr double MOST_LISTED = 0.75;             // of a row's blocks; where it would take more it takes all

// The choice of every row as bits: bit b of word w is block 64·w + b.
struct Tiles {
  int64_t* bits;  // [rows][words]
  int64_t words;
  const int64_t* row_of;  // the row of `bits` that row i of the call has; null: i itself
  uint64_t word(int64_t row, int64_t at) const { return uint64_t(bits[(row_of ? row_of[row] : row) * words + at]); }
};

// What the choice depends on.
struct TileSums {
  const float* sums;  // [blocks][n_rows] ΣE of each block without the target
  int64_t blocks, n_rows;
  const int64_t* targets;  // [n_rows]
  const double* whole;     // [n_rows] ΣE of all columns, or of those without the target; 0: all blocks are taken
};

void choose_tiles(const TileSums& of, double tolerance, const Tiles& to);

// The rows of each block.
class RowLists {
 public:
  RowLists() = default;
  RowLists(const Tiles& tiles, int64_t n_rows, int64_t n_blocks);

  bool given() const { return row != nullptr; }  // not where every row takes all
  Lists from(int64_t block, bool is_all_of_s) const { return {first.get() + block, row.get(), is_all_of_s}; }
  int64_t rows_of(int64_t begin, int64_t end) const { return first[end] - first[begin]; }  // of blocks [begin, end)
  int64_t most_rows(int64_t count) const;  // that any `count` blocks in a row have

 private:
  int64_t blocks = 0;
  Buffer<int64_t> first;  // [blocks + 1]
  Buffer<int32_t> row;
};

}  // namespace sdpo::cpu
