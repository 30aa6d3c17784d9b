// How much of a call the CPU computes at a time, and how that is divided over the threads.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "parallel.h"

namespace sdpo::cpu {

constexpr int64_t CHUNK_ELEMENTS = int64_t(1) << 22;  // of S in one chunk: 8 MiB in bfloat16
constexpr int64_t CHUNK_SUMS = int64_t(1) << 20;      // partial sums of a chunk without S: 4 MiB
constexpr int64_t CACHED_BYTES = int64_t(1) << 22;    // of S that every panel of dX reads again

inline int64_t blocks_of_chunk(int64_t n_rows, bool stored) {
  int64_t rows = std::max<int64_t>(n_rows, 1);
  return std::max<int64_t>(4, stored ? CHUNK_ELEMENTS / (PANEL * rows) : CHUNK_SUMS / rows);
}

// Into how many parts the rows of a chunk of `blocks` blocks are split, so that every thread has several tasks.
inline int64_t row_parts(int64_t blocks, int64_t n_rows) {
  int64_t wanted = 4 * int64_t(torch::stable::get_num_threads());
  int64_t parts = blocks >= wanted ? 1 : (wanted + blocks - 1) / blocks;
  return std::max<int64_t>(1, std::min(parts, n_rows / (8 * TILE_ROWS)));
}

inline int64_t row_border(int64_t part, int64_t parts, int64_t n_rows) {
  return part == parts ? n_rows : n_rows * part / parts / TILE_ROWS * TILE_ROWS;
}

}  // namespace sdpo::cpu
