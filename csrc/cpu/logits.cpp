#include "logits.h"

#include <cmath>
#include <cstring>

#include "parallel.h"

namespace sdpo::cpu {

void logits_forward(const Kernels& on, const Matrix& logits, const int64_t* targets, double temperature, float* logps,
                    double* lse) {
  Reciprocal by_temperature = reciprocal(temperature);
  parallel_rows(logits.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      int64_t y = targets[i], at = i * logits.stride + y;
      logps[i] = 0.0f;
      lse[i] = 0.0;
      if (y == IGNORE_INDEX) continue;

      float logit = logits.bf16 ? float_of_bf16(static_cast<const uint16_t*>(logits.data)[at])
                                : static_cast<const float*>(logits.data)[at];
      double target = double(logit) / temperature, sum, by;

      // exp-direct with k = the target's logit; rows out of range once more, with a running maximum
      on.row_sum(logits, i, y, by_temperature, float(target), false, &sum, &by);
      by += SHIFT;
      if (sum > LARGEST_SUM || std::isinf(target)) on.row_sum(logits, i, y, by_temperature, 0.0f, true, &sum, &by);

      double rest = by + std::log(sum), logp = target == INFINITY ? NAN : logp_of(target, rest);
      logps[i] = float(logp);
      lse[i] = target == -INFINITY ? rest : target - logp;
    }
  });
}

void logits_backward(const Kernels& on, const Matrix& logits, const int64_t* targets, double temperature,
                     const float* logps, const double* lse, const float* grad, void* out) {
  Reciprocal by_temperature = reciprocal(temperature);
  size_t row_bytes = size_t(logits.columns) * (logits.bf16 ? 2 : 4);
  parallel_rows(logits.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      char* to = static_cast<char*>(out) + i * row_bytes;
      if (targets[i] == IGNORE_INDEX) {
        std::memset(to, 0, row_bytes);
        continue;
      }
      float at_target = float(-std::expm1(double(logps[i])) * grad[i] / temperature);
      on.row_gradient(logits, i, targets[i], by_temperature, lse[i], grad[i], at_target, to);
    }
  });
}

}  // namespace sdpo::cpu
