#include "tiles.h"

#include <bit>
#include <cstring>

namespace sdpo::cpu {

namespace {

constexpr int64_t WORD = 64;         // bits
constexpr int64_t ROWS_AT_ONCE = 8;  // their sums of a block are next to each other, and their bins fit the cache
constexpr int BIN_SHIFT = 21;        // a float's exponent and the first 2 bits after it: a quarter of an octave
constexpr int BINS = 1024;

// The probability of a block of a row, in float32.
struct Masses {
  const TileSums& of;
  int64_t row;
  double by;  // 1/whole
  float at(int64_t block) const { return float(of.sums[block * of.n_rows + row] * by); }
};

int bin_of(float mass) { return int((bits_of_float(mass) & 0x7fffffffu) >> BIN_SHIFT); }

// Of one row, given the sums of its bins: bins below it are left out. Nothing is within a sum that is NaN.
int first_kept(const double* bins, double within) {
  double sum = 0.0;
  for (int bin = 0; bin < BINS; bin++) {
    sum += bins[bin];
    if (!(sum <= within)) return bin;
  }
  return BINS;
}

void take_all(int64_t blocks, int64_t* bits) {
  for (int64_t at = 0; at * WORD < blocks; at++) {
    int64_t here = std::min(blocks - at * WORD, WORD);
    bits[at] = int64_t(~uint64_t(0) >> (WORD - here));
  }
}

void choose_rows(const TileSums& of, int64_t begin, int64_t count, double within, const Tiles& to, double* bins) {
  std::memset(bins, 0, count * BINS * sizeof(double));
  std::memset(to.bits + begin * to.words, 0, count * to.words * sizeof(int64_t));
  double by[ROWS_AT_ONCE];
  int kept[ROWS_AT_ONCE];
  for (int64_t i = 0; i < count; i++) by[i] = 1.0 / of.whole[begin + i];

  for (int64_t block = 0; block < of.blocks; block++)
    for (int64_t i = 0; i < count; i++) {
      float mass = Masses{of, begin + i, by[i]}.at(block);
      if (of.targets[begin + i] / PANEL != block) bins[i * BINS + bin_of(mass)] += mass;
    }

  for (int64_t i = 0; i < count; i++) kept[i] = of.whole[begin + i] == 0.0 ? 0 : first_kept(bins + i * BINS, within);
  int64_t taken[ROWS_AT_ONCE] = {};
  for (int64_t block = 0; block < of.blocks; block++)
    for (int64_t i = 0; i < count; i++) {
      bool takes = of.targets[begin + i] / PANEL == block || bin_of(Masses{of, begin + i, by[i]}.at(block)) >= kept[i];
      taken[i] += takes;
      to.bits[(begin + i) * to.words + block / WORD] |= int64_t(uint64_t(takes) << (block % WORD));
    }
  for (int64_t i = 0; i < count; i++)
    if (taken[i] > MOST_LISTED * of.blocks) take_all(of.blocks, to.bits + (begin + i) * to.words);
}

}  // namespace

void choose_tiles(const TileSums& of, double tolerance, const Tiles& to) {
  double within = tolerance * (1.0 - TOLERANCE_MARGIN);
  int64_t groups = (of.n_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  parallel_tasks(groups, ROWS_AT_ONCE * BINS * sizeof(double), [&](int64_t group, void* bins) {
    int64_t begin = group * ROWS_AT_ONCE, count = std::min(ROWS_AT_ONCE, of.n_rows - begin);
    choose_rows(of, begin, count, within, to, static_cast<double*>(bins));
  });
}

RowLists::RowLists(const Tiles& tiles, int64_t n_rows, int64_t n_blocks) : blocks(n_blocks) {
  first = make_buffer<int64_t>(blocks + 1);
  std::memset(first.get(), 0, (blocks + 1) * sizeof(int64_t));
  auto for_bits = [&](int64_t at, const auto& f) {
    for (int64_t i = 0; i < n_rows; i++)
      for (uint64_t bits = tiles.word(i, at); bits; bits &= bits - 1) f(at * WORD + std::countr_zero(bits), i);
  };

  parallel_tasks(tiles.words, 0,
                 [&](int64_t at, void*) { for_bits(at, [&](int64_t block, int64_t) { first[block + 1]++; }); });
  for (int64_t block = 0; block < blocks; block++) first[block + 1] += first[block];
  if (first[blocks] == blocks * n_rows) return;

  row = make_buffer<int32_t>(first[blocks]);
  parallel_tasks(tiles.words, 0, [&](int64_t at, void*) {
    int64_t next[WORD];
    for (int64_t b = 0; b < WORD && at * WORD + b < blocks; b++) next[b] = first[at * WORD + b];
    for_bits(at, [&](int64_t block, int64_t i) { row[next[block % WORD]++] = int32_t(i); });
  });
}

int64_t RowLists::most_rows(int64_t count) const {
  int64_t most = 0;
  for (int64_t begin = 0; begin + count <= blocks; begin++) most = std::max(most, rows_of(begin, begin + count));
  return most;
}

}  // namespace sdpo::cpu
