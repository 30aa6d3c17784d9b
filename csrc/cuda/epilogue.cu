// The pair epilogue in one launch of one block: segment sums, a loss of the sigmoid family, slopes and metrics. The
// order of every sum is fixed.
//
// Register budget: 96 (logarithms and exponentials in double; it runs once per step).
#include "../pair_math.h"

#include "device.cuh"
#include "kernels.h"

namespace sdpo::cuda {

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

// The first row whose sequence is `sequence` or a later one.
__device__ int64_t first_row(const Pairs& p, int64_t sequence) {
  int64_t begin = 0, end = p.n_scored;
  while (begin < end) {
    int64_t middle = (begin + end) / 2;
    if (p.segment[middle] < sequence)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// One warp per sequence.
__device__ void segment_sums(const Pairs& p) {
  int lane = threadIdx.x % 32;
  for (int64_t sequence = threadIdx.x / 32; sequence < 2 * p.n_pairs; sequence += WARPS) {
    double sum = 0.0;
    if (p.index) {
      int64_t end = first_row(p, sequence + 1);
      for (int64_t i = first_row(p, sequence) + lane; i < end; i += 32) sum += p.logps[p.index[i]];
      sum = over_warp<Sum>(sum);
    } else {
      sum = p.logps[sequence];
    }
    if (lane == 0) p.sums[sequence] = float(sum);
  }
}

__global__ void __launch_bounds__(THREADS) pair_epilogue_kernel(Pairs p) {
  __shared__ double shared[WARPS];
  segment_sums(p);
  __syncthreads();  // also makes the sums visible to the whole block

  double mean = 0.0;
  for (int64_t i = threadIdx.x; i < p.n_pairs; i += THREADS) {
    int64_t chosen = i, rejected = p.n_pairs + i;
    double a = double(p.sums[chosen]) - p.ref[chosen], b = double(p.sums[rejected]) - p.ref[rejected];
    PairResult result =
        pair_loss(p.loss, a, b, double(p.counts[chosen]), double(p.counts[rejected]), p.beta, p.smoothing);

    mean += result.loss;
    p.slopes[chosen] = float(result.chosen_slope / p.n_pairs);
    p.slopes[rejected] = float(result.rejected_slope / p.n_pairs);

    p.metrics[i] = float(p.beta * a);
    p.metrics[p.n_pairs + i] = float(p.beta * b);
    p.metrics[2 * p.n_pairs + i] = float(p.beta * (a - b));
    p.metrics[3 * p.n_pairs + i] = a > b ? 1.0f : 0.0f;
  }
  mean = over_block<Sum>(mean, shared);
  if (threadIdx.x == 0) *p.out_loss = float(mean / p.n_pairs);
}

}  // namespace

void pair_epilogue(const Pairs& pairs, cudaStream_t stream) {
  if (pairs.n_pairs == 0) return;
  SDPO_LAUNCH((pair_epilogue_kernel), 1, THREADS, stream, pairs);
  check_launch("pair_epilogue");
}

}  // namespace sdpo::cuda
