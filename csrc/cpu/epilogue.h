// From log-probs of tokens to the loss of a batch of pairs and its slopes, in one pass over [N] and [2B].
#pragma once

#include <cstdint>

namespace sdpo::cpu {

struct Pairs {
  const float* logps;      // [n_rows] of tokens, or [2B] already summed
  const int64_t* index;    // [n_scored] scored rows; null: logps are the sums
  const int64_t* segment;  // [n_scored] the sequence of each
  int64_t n_rows, n_scored, n_pairs;
  const float* ref;       // [2B] the reference's sums
  const int64_t* counts;  // [2B] scored tokens
  int64_t loss;           // a PairLoss
  double beta, smoothing;
};

// loss [1] (mean over pairs); sums [2B]; metrics [4][B]: rewards of chosen and rejected, margins, accuracy; slopes [2B]
// of the loss by each sum.
void pair_epilogue(const Pairs& pairs, float* loss, float* sums, float* metrics, float* slopes);

}  // namespace sdpo::cpu
