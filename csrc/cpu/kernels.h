// The table of tasks that each file compiled for one kind of chip provides. A task is a piece of work for one thread;
// tasks of one call write to different places, so results do not depend on the number of threads.
//
// A unit is 32 bits of a row of operands along the summed dimension: one float, or two bfloat16. A panel holds 64
// columns of the right-hand operand, unit by unit: [units][64]. Matrix products see units only; only the packers, the
// multiply-add and the code that stores S know whether a unit is one float or a pair of bfloat16.
#pragma once

#include <cstdint>

#include "../call.h"

namespace sdpo::cpu {

using Unit = uint32_t;
constexpr int64_t TILE_ROWS = 6;         // 6×64 accumulators fill the registers of AVX-512
constexpr int64_t UNITS_AT_ONCE = 1024;  // of the summed dimension: a panel of 256 KiB stays in the second-level cache

constexpr int64_t UNITS_OF_A_SUM = 128;  // a logit is a sum of sums of this length: less rounding than one long sum
constexpr int64_t BLOCKS_AT_ONCE = 16;   // of S that a task of dX sums over at a time: 1024 columns of V

// The extras' sums over 64 logits of a row, without the target except in `all`; e_j = exp(z_j - top).
struct BlockExtras {
  float top, sum, sum_z, sum_sq, all;  // max z, Σ e, Σ e·(z − top), Σ e², Σ z
};

// Which rows take part in each block of a chunk; those of block b are row[first[b]] … row[first[b + 1] - 1], ascending.
struct Lists {
  const int64_t* first = nullptr;
  const int32_t* row = nullptr;  // null: all rows take part in every block
  bool is_all_of_s = false;      // S holds no other rows: one block's after the other's, from first[0] on

  SDPO_HD_MEMBER int64_t count(int64_t block, int64_t n_rows) const {
    return row ? first[block + 1] - first[block] : n_rows;
  }
  SDPO_HD_MEMBER int64_t at(int64_t block, int64_t place) const { return row ? row[first[block] + place] : place; }
};

// The operands of a chunk's logits.
struct Logits {
  const Unit* x;  // [n_rows][x_units]
  int64_t n_rows, x_units;
  Matrix weight;           // [V, H]
  const float* bias;       // [V] or null
  const int64_t* targets;  // [n_rows]
  const float* shift;      // [n_rows] k
  Head head;
  int64_t first_block;  // the chunk's first block of 64 columns
  float* sums;    // [blocks of the chunk][n_rows]: Σ E over the block's columns without the target; null: not wanted
  float* maxima;  // the same shape, or null; if given, sums are Σ exp(z - maximum of the block) and no S is stored
  Blocks out;
  BlockExtras* extras = nullptr;  // the shape of sums, or null
  float* target_z = nullptr;      // [n_rows] the target's logit as these products give it; with extras
  Lists lists = {};               // of the backward: with them no sums are wanted
};

// dX += S·W over a chunk.
struct HiddenGradient {
  Blocks s;
  Matrix weight;
  int64_t first_block, n_blocks;
  int64_t n_rows;
  float* sum;      // [n_rows][stride]
  int64_t stride;  // H rounded up to 64
  Lists lists;
};

// dW = Sᵀ·(r ⊙ X) + Yᵀ·(t ⊙ X) over a chunk.
struct WeightGradient {
  Blocks s;
  int64_t n_rows, first_block;
  const Unit* scaled_x;  // panels of 64 columns of H, each [units of n_rows][64]; with lists each block makes its own
  const float* r;        // [n_rows]
  Lists lists;
  const Unit* x;  // [n_rows][x_units]
  int64_t x_units;
  Targets targets;
  void* out;  // [V, width] contiguous
  int64_t n_columns, width;
  bool out_bf16;
};

struct Kernels {
  const char* name;
  bool bf16;                        // units are pairs of bfloat16
  int64_t (*units)(int64_t count);  // how many units hold `count` numbers
  // rows of `from` (by `row_of`, or all) as units, padded with 0
  void (*load_rows)(const Matrix& from, int64_t begin, int64_t end, Unit* to);
  int64_t (*logits_scratch)(const Logits&, int64_t rows);
  // of a block's rows: from place `begin` on to before `end`
  void (*logits)(const Logits&, int64_t block, int64_t begin, int64_t end, void* scratch);
  int64_t (*hidden_gradient_scratch)();
  void (*hidden_gradient)(const HiddenGradient&, int64_t panel, int64_t row_begin, int64_t row_end, void* scratch);
  void (*hidden_gradient_listed)(const HiddenGradient&, int64_t panel, int64_t row_begin, int64_t row_end,
                                 void* scratch);
  // one panel of r ⊙ X: 64 columns of x [n_rows][x_units] from column 64·panel on; of the rows in `list`, or of all
  void (*scale_rows)(const Unit* x, int64_t n_rows, const int32_t* list, int64_t x_units, int64_t width, const float* r,
                     int64_t panel, Unit* to);
  int64_t (*weight_gradient_scratch)(const WeightGradient&);
  void (*weight_gradient)(const WeightGradient&, int64_t block, void* scratch);
  // of a block: Σ_i r_i S_ij
  void (*bias_gradient)(const Blocks&, const Lists&, int64_t n_rows, int64_t block, const float* r, double* to);
  // existing logits, row by row: see logits.cpp
  void (*row_sum)(const Matrix& logits, int64_t row, int64_t target, const Reciprocal& temperature, float shift,
                  bool online, double* sum, double* maximum);
  void (*row_gradient)(const Matrix& logits, int64_t row, int64_t target, const Reciprocal& temperature, double lse,
                       float g, float at_target, void* to);
};

const Kernels* avx512bf16_bf16();
const Kernels* avx512bf16_f32();
const Kernels* avx512_f32();
const Kernels* avx2_f32();
const Kernels* base_f32();

}  // namespace sdpo::cpu
