#include "epilogue.h"

#include <stdexcept>
#include <vector>

#include "../pair_math.h"

namespace sdpo::cpu {

void pair_epilogue(const Pairs& p, float* loss, float* sums, float* metrics, float* slopes) {
  // log-probs of tokens to sums of sequences, in double
  std::vector<double> total(2 * p.n_pairs, 0.0);
  if (p.index)
    for (int64_t i = 0; i < p.n_scored; i++) {
      bool inside = p.segment[i] >= 0 && p.segment[i] < 2 * p.n_pairs && p.index[i] >= 0 && p.index[i] < p.n_rows;
      if (!inside) throw std::out_of_range("sdpo_kernels: rows: an index or a segment lies outside the batch");
      total[p.segment[i]] += p.logps[p.index[i]];
    }
  else
    for (int64_t s = 0; s < 2 * p.n_pairs; s++) total[s] = p.logps[s];

  // the caller gets float sums; loss and slopes must be of those very numbers
  for (int64_t s = 0; s < 2 * p.n_pairs; s++) sums[s] = float(total[s]);

  double mean = 0.0;
  for (int64_t i = 0; i < p.n_pairs; i++) {
    int64_t chosen = i, rejected = p.n_pairs + i;
    double a = double(sums[chosen]) - p.ref[chosen], b = double(sums[rejected]) - p.ref[rejected];
    double chosen_count = double(p.counts[chosen]), rejected_count = double(p.counts[rejected]);
    PairResult result = pair_loss(p.loss, a, b, chosen_count, rejected_count, p.beta, p.smoothing);

    mean += result.loss;
    slopes[chosen] = float(result.chosen_slope / p.n_pairs);
    slopes[rejected] = float(result.rejected_slope / p.n_pairs);

    metrics[i] = float(p.beta * a);
    metrics[p.n_pairs + i] = float(p.beta * b);
    metrics[2 * p.n_pairs + i] = float(p.beta * (a - b));
    metrics[3 * p.n_pairs + i] = a > b ? 1.0f : 0.0f;
  }
  *loss = float(mean / p.n_pairs);
}

}  // namespace sdpo::cpu
