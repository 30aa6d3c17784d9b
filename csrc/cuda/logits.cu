// Existing logits, row by row (logits_logps): one read in the forward, one read and one write in the backward, over the
// logits themselves if the caller wants that. One block per row; 128-bit loads if rows are aligned to 16 bytes.
//
// Register budget: 64.
#include "device.cuh"
#include "kernels.h"

namespace sdpo::cuda {

namespace {

constexpr int THREADS = 256, AT_ONCE = 8;
constexpr int64_t IGNORE_INDEX = -100;

__device__ inline float number(const float* at) { return *at; }
__device__ inline float number(const uint16_t* at) { return float_of_bf16(*at); }

// f(j, logit) for every column of the row that this thread handles, 8 at a time if they are aligned.
template <class Element, class F>
__device__ void each_logit(const Element* row, int64_t columns, const F& f) {
  bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  int64_t whole = aligned ? columns / AT_ONCE * AT_ONCE : 0;
  for (int64_t j = threadIdx.x * AT_ONCE; j < whole; j += THREADS * AT_ONCE) {
    float some[AT_ONCE];
    load_8(row + j, some);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) f(j + i, some[i]);
  }
  for (int64_t j = whole + threadIdx.x; j < columns; j += THREADS) f(j, number(row + j));
}

template <class Element>
__global__ void __launch_bounds__(THREADS)
    logits_forward_kernel(const Element* logits, int64_t stride, int64_t columns, const int64_t* targets,
                          double temperature, Reciprocal by, float* logps, double* lse) {
  __shared__ double sums[THREADS / 32];
  __shared__ float tops[THREADS / 32];
  int64_t at = blockIdx.x, y = targets[at];
  const Element* row = logits + at * stride;
  if (y == IGNORE_INDEX) {
    if (threadIdx.x == 0) logps[at] = 0.0f, lse[at] = 0.0;
    return;
  }

  // exp-direct, with k = the target's logit
  double target = double(number(row + y)) / temperature, sum = 0.0;
  float k = float(target);
  each_logit(row, columns, [&](int64_t j, float a) { sum += j == y ? 0.0f : exp_shifted(divided(a, by) - k); });
  sum = over_block<Sum>(sum, sums);
  double rest = rest_of_sum(sum, k);

  if (out_of_range(sum, target)) {  // the same for the whole block: once more, relative to the row's maximum
    float top = -INFINITY;
    each_logit(row, columns, [&](int64_t j, float a) { top = j == y ? top : Max::combine(top, divided(a, by)); });
    top = over_block<Max>(top, tops);
    double again = 0.0;
    if (top != -INFINITY)
      each_logit(row, columns, [&](int64_t j, float a) { again += j == y ? 0.0f : exp_of(divided(a, by) - top); });
    again = over_block<Sum>(again, sums);
    rest = double(top) + log(again);
  }

  if (threadIdx.x) return;
  RowResult result = row_result(target, rest);
  logps[at] = float(result.logp);
  lse[at] = result.lse;
}

template <class Element>
__global__ void __launch_bounds__(THREADS)
    logits_backward_kernel(const Element* logits, int64_t stride, int64_t columns, const int64_t* targets,
                           double temperature, Reciprocal by, const float* logps, const double* lse, const float* grad,
                           Element* out) {
  int64_t at = blockIdx.x, y = targets[at];
  const Element* row = logits + at * stride;
  Element* to = out + at * columns;
  bool scored = y != IGNORE_INDEX;
  float rounded = scored ? float(lse[at]) : 0.0f, g = scored ? grad[at] : 0.0f;
  // puts back what rounding the logsumexp lost
  float factor = scored ? -g * by.high * float(exp(rounded - lse[at])) : 0.0f;
  float at_target = scored ? float(-expm1(double(logps[at])) * g / temperature) : 0.0f;
  auto gradient = [&](int64_t j, float a) {
    return !scored ? 0.0f : j == y ? at_target : factor * exp_of(divided(a, by) - rounded);
  };

  bool aligned = reinterpret_cast<uintptr_t>(row) % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
  int64_t whole = aligned ? columns / AT_ONCE * AT_ONCE : 0;
  for (int64_t j = threadIdx.x * AT_ONCE; j < whole; j += THREADS * AT_ONCE) {
    float some[AT_ONCE];
    load_8(row + j, some);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) some[i] = gradient(j + i, some[i]);
    store_8(to + j, some);
  }
  for (int64_t j = whole + threadIdx.x; j < columns; j += THREADS)
    store_number(to, sizeof(Element) == 2, j, gradient(j, number(row + j)));
}

}  // namespace

void logits_forward(const Matrix& logits, const int64_t* targets, double temperature, float* logps, double* lse,
                    cudaStream_t stream) {
  if (logits.rows == 0) return;
  Reciprocal by = reciprocal(temperature);
  unsigned rows = unsigned(logits.rows);
  if (logits.bf16)
    SDPO_LAUNCH((logits_forward_kernel), rows, THREADS, stream, static_cast<const uint16_t*>(logits.data),
                logits.stride, logits.columns, targets, temperature, by, logps, lse);
  else
    SDPO_LAUNCH((logits_forward_kernel), rows, THREADS, stream, static_cast<const float*>(logits.data), logits.stride,
                logits.columns, targets, temperature, by, logps, lse);
  check_launch("logits_forward");
}

void logits_backward(const Matrix& logits, const int64_t* targets, double temperature, const float* logps,
                     const double* lse, const float* grad, void* out, cudaStream_t stream) {
  if (logits.rows == 0) return;
  Reciprocal by = reciprocal(temperature);
  unsigned rows = unsigned(logits.rows);
  if (logits.bf16)
    SDPO_LAUNCH((logits_backward_kernel), rows, THREADS, stream, static_cast<const uint16_t*>(logits.data),
                logits.stride, logits.columns, targets, temperature, by, logps, lse, grad, static_cast<uint16_t*>(out));
  else
    SDPO_LAUNCH((logits_backward_kernel), rows, THREADS, stream, static_cast<const float*>(logits.data), logits.stride,
                logits.columns, targets, temperature, by, logps, lse, grad, static_cast<float*>(out));
  check_launch("logits_backward");
}

}  // namespace sdpo::cuda
