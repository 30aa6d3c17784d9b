// Log-probs of existing logits, row by row, and their gradient, which may be written over the logits.
#pragma once

#include "kernels.h"

namespace sdpo::cpu {

constexpr int64_t IGNORE_INDEX = -100;

// logps, lse [N]; rows whose target is IGNORE_INDEX get 0.
void logits_forward(const Kernels& on, const Matrix& logits, const int64_t* targets, double temperature, float* logps,
                    double* lse);

// out [N, V] contiguous, of logits' type.
void logits_backward(const Kernels& on, const Matrix& logits, const int64_t* targets, double temperature,
                     const float* logps, const double* lse, const float* grad, void* out);

}  // namespace sdpo::cpu
