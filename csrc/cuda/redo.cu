// Recomputes rows whose sum is out of float's range, or whose target is infinite.
//     1. a running maximum over all columns but the target: the logsumexp
//     2. log-prob and k = logsumexp
//     3. if S or Σ S·W is kept: both with the new k
// One block per row, always launched, so that nothing waits for the host; blocks of other rows return at once. Logits
// are dot products here, one warp per column: slow, rare and correct.
//
// Register budget: 80.
#include "device.cuh"
#include "kernels.h"

namespace sdpo::cuda {

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Running {
  float top, total;  // largest z so far, Σ exp(z − top)
  bool no_number;

  __device__ void add(float other_top, float other_total, bool other_no_number) {
    no_number |= other_no_number;
    if (other_top == -INFINITY) return;
    float larger = other_top > top ? other_top : top;
    total = (top == -INFINITY ? 0.0f : total * exp_of(top - larger)) + other_total * exp_of(other_top - larger);
    top = larger;
  }
};

// z of column j and its slope, the same in every lane.
__device__ float column_logit(const Call& call, int64_t row, int64_t j, float* slope) {
  float a = 0.0f;
  for (int64_t h = threadIdx.x % 32; h < call.hidden.columns; h += 32)
    a += call.hidden.number(row, h) * call.weight.number(j, h);
  a = over_warp<Sum>(a) + (call.bias ? call.bias[j] : 0.0f);
  return logit(call.head, a, slope);
}

// log Σ exp over all columns but the target.
__device__ double log_sum_of_rest(const Call& call, int64_t row, int64_t target) {
  __shared__ float tops[WARPS], totals[WARPS];
  __shared__ bool no_numbers[WARPS];
  Running mine{-INFINITY, 0.0f, false};
  int warp = threadIdx.x / 32;
  for (int64_t j = warp; j < call.weight.rows; j += WARPS) {
    float slope, z = column_logit(call, row, j, &slope);
    if (j != target) mine.add(z, 1.0f, z != z);
  }

  tops[warp] = mine.top, totals[warp] = mine.total, no_numbers[warp] = mine.no_number;
  __syncthreads();

  Running all{-INFINITY, 0.0f, false};
  for (int i = 0; i < WARPS; i++) all.add(tops[i], totals[i], no_numbers[i]);
  return all.no_number ? double(NAN) : double(all.top) + log(double(all.total));
}

// S of all columns with k = logsumexp, to the stash and into ΣS·W.
__device__ void store_row(const Redo& r, int64_t row, int64_t target, float shift) {
  __shared__ float some[WARPS];
  const Call& call = r.call;
  int warp = threadIdx.x / 32;
  int64_t width = call.hidden.columns, columns = call.weight.rows;
  if (r.hidden_sum)
    for (int64_t h = threadIdx.x; h < width; h += THREADS) r.hidden_sum[row * width + h] = 0.0f;
  for (int64_t first = 0; first < columns; first += WARPS) {
    int64_t j = first + warp;
    float slope = 1.0f, s = 0.0f;
    if (j < columns) {
      float z = column_logit(call, row, j, &slope);
      s = j == target ? 0.0f : exp_shifted(z - shift) * slope;
    }
    if (r.stash && j < columns && j < r.stash_columns && threadIdx.x % 32 == 0)
      store_number(r.stash, r.bf16, row * r.stash_stride + j, s);

    if (!r.hidden_sum) continue;
    __syncthreads();  // the last columns may still be reading `some`
    if (threadIdx.x % 32 == 0) some[warp] = s;
    __syncthreads();
    for (int64_t h = threadIdx.x; h < width; h += THREADS) {
      float sum = r.hidden_sum[row * width + h];
      for (int i = 0; i < WARPS && first + i < columns; i++) sum += some[i] * call.weight.number(first + i, h);
      r.hidden_sum[row * width + h] = sum;
    }
  }
}

__global__ void __launch_bounds__(THREADS) redo_rows_kernel(Redo r) {
  int64_t row = blockIdx.x;
  if (!out_of_range(r.total[row], r.target_logits[row])) return;
  int64_t target = r.call.targets[row];
  double rest = log_sum_of_rest(r.call, row, target);
  RowResult result = row_result(r.target_logits[row], rest);
  SliceRow own = slice_row(rest);
  bool slice = r.call.is_slice();
  float shift = slice ? own.shift : float(result.lse);

  if (threadIdx.x == 0) {
    if (!slice) r.logps[row] = float(result.logp);
    r.state[2 * row] = slice ? own.sum : result.lse;
    r.state[2 * row + 1] = shift;
  }
  if (r.stash || r.hidden_sum) store_row(r, row, target, shift);
}

}  // namespace

void redo_rows(const Redo& redo, cudaStream_t stream) {
  if (redo.call.hidden.rows == 0) return;
  SDPO_LAUNCH((redo_rows_kernel), unsigned(redo.call.hidden.rows), THREADS, stream, redo);
  check_launch("redo_rows");
}

}  // namespace sdpo::cuda
