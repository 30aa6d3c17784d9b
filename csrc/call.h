// The structures shared by the walk and every device's leaves: matrices, blocks of S, a call, what is kept and wanted.
#pragma once

#include <cstdint>

#include "row_math.h"

namespace sdpo {

constexpr int64_t PANEL = 64;  // columns of a block of S, and of a panel of packed operands

// A matrix of the caller: rows of float or bfloat16, unit stride within a row.
struct Matrix {
  const void* data;
  int64_t rows, columns, stride;
  bool bf16;
  bool round;  // float numbers are rounded to bfloat16 when read (autocast)

  SDPO_HD_MEMBER float number(int64_t row, int64_t column) const {
    int64_t at = row * stride + column;
    if (bf16) return float_of_bf16(static_cast<const uint16_t*>(data)[at]);
    float value = static_cast<const float*>(data)[at];
    return round ? float_of_bf16(bf16_of_float(value)) : value;
  }
};

// S of a chunk: blocks of 64 columns, each [rows][64], of the call's operand type; columns past V are 0.
struct Blocks {
  void* data;             // null: not wanted
  int64_t rows;           // of a block
  const int64_t* row_of;  // the row of a block that holds row i of the call; null: i itself
  int64_t stride = 0;     // CUDA stores S by rows: elements from row to row; 0: by blocks
};

// The scored rows of a batch and a head.
struct Call {
  Matrix hidden;           // [N, H]
  Matrix weight;           // [V, H]
  const float* bias;       // [V] or null
  const int64_t* targets;  // [N]; of a slice: −1 where the target is a column of another one
  Head head;
  double softcap, temperature;
  const double* target_logits;  // [N] z_y, given if the head is a slice of the vocabulary; else null
  SDPO_HD_MEMBER bool is_slice() const { return target_logits != nullptr; }
  int64_t blocks() const { return (weight.rows + PANEL - 1) / PANEL; }
};

// What a forward keeps for the backward; at most one of the two.
struct Kept {
  int64_t blocks;  // of S, the first ones
  Blocks stash;
  float* direction;  // [N, H] d logp / d hidden, for a head that is not trained (never of a slice)
};

// Which gradients a backward writes; null: not wanted.
struct Gradients {
  void* hidden;  // [N, H] in hidden's type
  void* weight;  // [V, H'] in weight's type
  float* bias;   // [V]
  Matrix
      weight_hidden;  // [N, H'] the columns of hidden that the weight's gradient is wanted for: all, or the last ones
};

// The rows sorted by their targets, and the targets' coefficients: Y and t of walk.h. Rows that share a target are in
// ascending order, so their terms are summed in a fixed one.
struct Targets {
  const int64_t* rows;  // [count] rows in the order of their targets
  int64_t count;
  const int64_t* targets;  // [N]
  const float* t;          // [N]

  SDPO_HD_MEMBER int64_t column(int64_t at) const { return targets[rows[at]]; }
  SDPO_HD_MEMBER bool is_before(int64_t at, int64_t end) const { return at < count && column(at) < end; }
  SDPO_HD_MEMBER int64_t first_from(int64_t start) const {  // the first whose target is at least `start`
    int64_t low = 0, high = count;
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if (column(middle) < start)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

}  // namespace sdpo
