// The targets' own terms of dW, Yᵀ·(t ⊙ X): added in float, once rows with one target follow each other.
//
// Register budget: 48.
#include "device.cuh"
#include "kernels.h"

namespace sdpo::cuda {

namespace {

constexpr int THREADS = 256;

// A row's place is the number of rows before it. N² comparisons, but of integers in shared memory: at N 8192 a thread
// does 8192, which takes less time than the launches of a sort.
__global__ void __launch_bounds__(THREADS) sort_targets_kernel(const int64_t* targets, int64_t n_rows, int64_t* rows) {
  __shared__ int64_t some[THREADS];
  int64_t row = int64_t(blockIdx.x) * THREADS + threadIdx.x, place = 0;
  int64_t target = row < n_rows ? targets[row] : 0;
  for (int64_t first = 0; first < n_rows; first += THREADS) {
    __syncthreads();  // the last comparisons may still be reading `some`
    if (first + threadIdx.x < n_rows) some[threadIdx.x] = targets[first + threadIdx.x];
    __syncthreads();
    int count = int(first + THREADS < n_rows ? THREADS : n_rows - first);
    for (int i = 0; i < count; i++) place += some[i] < target || (some[i] == target && first + i < row);
  }
  if (row < n_rows) rows[place] = row;
}

// Σ t·x at column h over the rows with target `column`, the first of which is at `begin`.
__device__ float terms(const Targets& targets, const Matrix& x, int64_t begin, int64_t column, int64_t h) {
  float sum = 0.0f;
  for (int64_t at = begin; targets.is_before(at, column + 1); at++) {
    int64_t row = targets.rows[at];
    sum += targets.t[row] * x.number(row, h);
  }
  return sum;
}

// One block per row of dW.
__global__ void finish_weight_kernel(const float* sum, Targets targets, Matrix x, int64_t first, uint16_t* out) {
  int64_t row = blockIdx.x, width = x.columns, begin = targets.first_from(first + row);
  bool any = targets.is_before(begin, first + row + 1);
  for (int64_t h = threadIdx.x; h < width; h += blockDim.x) {
    float value = sum[row * width + h];
    if (any) value += terms(targets, x, begin, first + row, h);
    out[row * width + h] = bf16_of_float(value);
  }
}

// One block per sorted row and 256 columns of H; the first of those that share a target does the work.
__global__ void add_to_weight_kernel(Targets targets, Matrix x, int64_t first, int64_t rows, float* out) {
  int64_t at = blockIdx.x, target = targets.column(at), h = int64_t(blockIdx.y) * THREADS + threadIdx.x;
  bool repeated = at > 0 && targets.column(at - 1) == target;
  if (repeated || target < first || target >= first + rows || h >= x.columns) return;
  out[(target - first) * x.columns + h] += terms(targets, x, at, target, h);
}

}  // namespace

void sort_targets(const int64_t* targets, int64_t n_rows, int64_t* rows, cudaStream_t stream) {
  if (n_rows == 0) return;
  SDPO_LAUNCH((sort_targets_kernel), blocks_for(n_rows, THREADS), THREADS, stream, targets, n_rows, rows);
  check_launch("sort_targets");
}

void finish_weight(const float* sum, const Targets& targets, const Matrix& x, int64_t first, int64_t rows,
                   uint16_t* out, cudaStream_t stream) {
  if (rows == 0 || x.columns == 0) return;
  SDPO_LAUNCH((finish_weight_kernel), unsigned(rows), THREADS, stream, sum, targets, x, first, out);
  check_launch("finish_weight");
}

void add_to_weight(const Targets& targets, const Matrix& x, int64_t first, int64_t rows, float* out,
                   cudaStream_t stream) {
  if (targets.count == 0 || x.columns == 0) return;
  dim3 grid(unsigned(targets.count), blocks_for(x.columns, THREADS));
  SDPO_LAUNCH((add_to_weight_kernel), grid, THREADS, stream, targets, x, first, rows, out);
  check_launch("add_to_weight");
}

}  // namespace sdpo::cuda
