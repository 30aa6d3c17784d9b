// The sigmoid family's losses of one pair and their slopes, in double. sdpo_kernels/losses/ is the reference
// implementation and names the papers.
#pragma once

#include "row_math.h"

namespace sdpo {

enum PairLoss : int64_t { SIGMOID = 0, ROBUST = 1, HINGE = 2, IPO = 3 };  // the order of sdpo_kernels/epilogue_op.py

struct PairResult {
  double loss;
  double chosen_slope, rejected_slope;  // d loss / d summed log-prob
};

// log1p(exp(x)) and 1 / (1 + exp(-x)), without overflow.
SDPO_HD double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
SDPO_HD double sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

// a, b: log-ratios of chosen and rejected against the reference; the counts of their scored tokens.
SDPO_HD PairResult pair_loss(int64_t loss, double a, double b, double chosen_count, double rejected_count, double beta,
                             double smoothing) {
  double z = beta * (a - b);
  if (loss == IPO) {
    double d = a / chosen_count - b / rejected_count - 1 / (2 * beta);
    return {d * d, 2 * d / chosen_count, -2 * d / rejected_count};
  }

  double value, slope;  // slope: d loss / d z
  if (loss == HINGE) {
    value = 1 - z > 0 || z != z ? 1 - z : 0.0;  // slope 0 at the kink; NaN stays NaN
    slope = 1 - z > 0 ? -1.0 : z != z ? z : 0.0;
  } else {
    double sign = loss == ROBUST ? -1.0 : 1.0, scale = loss == ROBUST ? 1 / (1 - 2 * smoothing) : 1.0;
    value = scale * ((1 - smoothing) * softplus(-z) + sign * smoothing * softplus(z));
    slope = scale * (-(1 - smoothing) * sigmoid(-z) + sign * smoothing * sigmoid(z));
  }
  return {value, beta * slope, -beta * slope};
}

}  // namespace sdpo
