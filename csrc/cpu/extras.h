// A row's sums for the extras (entropy, log Σp², mean logit, top-1), added up block by block in double.
#pragma once

#include <cmath>

#include "kernels.h"

namespace sdpo::cpu {

// Like BlockExtras, over all blocks so far. Returned as six doubles per row, in the order of native.py's `_ROW_EXTRAS`.
struct RowExtras {
  double top = -INFINITY, sum = 0.0, sum_z = 0.0, sum_sq = 0.0, all = 0.0, target_z = 0.0;
};

inline void add(RowExtras& row, const BlockExtras& block) {
  row.all += block.all;
  if (block.top == -INFINITY && block.sum == 0.0f) return;  // no column but the target; a NaN goes on

  // all sums are relative to a maximum: rescale both sides to the larger one
  double before = row.top, top = block.top > before ? block.top : before;
  double old = row.sum == 0.0 ? 0.0 : std::exp(before - top), fresh = std::exp(block.top - top);
  double moved = row.sum == 0.0 ? 0.0 : old * (before - top) * row.sum;
  row.sum_z = old * row.sum_z + moved + fresh * (block.sum_z + (block.top - top) * block.sum);
  row.sum = old * row.sum + fresh * block.sum;
  row.sum_sq = old * old * row.sum_sq + fresh * fresh * block.sum_sq;
  row.top = top;
}

}  // namespace sdpo::cpu
