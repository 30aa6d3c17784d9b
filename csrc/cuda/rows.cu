// The rows of a chunk of logits: the targets' logits, E and S with their sums, and what follows from the sums.
//
// Register budget: 48 (tests/backends/test_cuda_library.py checks every file's on every architecture).
#include "device.cuh"
#include "kernels.h"

namespace sdpo::cuda {

namespace {

constexpr int THREADS = 128;
constexpr int AT_ONCE = 8;  // numbers per thread: two 128-bit loads of float, one 128-bit store of bfloat16

// One block per row and slab. Reads each product once.
template <bool CAPPED, class Element>
__global__ void __launch_bounds__(THREADS) exp_rows_kernel(Chunk c) {
  __shared__ float shared[THREADS / 32];
  int64_t row = blockIdx.x, start = int64_t(blockIdx.y) * SLAB;
  int64_t stop = start + SLAB < c.padded ? start + SLAB : c.padded, target = c.targets[row] - c.first;
  const float* products = c.products + row * c.padded;
  Element* s = c.s ? static_cast<Element*>(c.s) + row * c.s_stride : nullptr;
  float shift = c.shift[row], total = 0.0f;

  for (int64_t j = start + threadIdx.x * AT_ONCE; j < stop; j += THREADS * AT_ONCE) {
    float a[AT_ONCE], out[AT_ONCE];
    load_8(products + j, a);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      bool counts = j + i < c.columns && j + i != target;
      float bias = c.bias && j + i < c.columns ? c.bias[c.first + j + i] : 0.0f, slope = 1.0f, x = a[i] + bias;
      float z = CAPPED ? tanh_and_slope(x * c.head.before, &slope) * c.head.after : x * c.head.before;
      float e = counts ? exp_shifted(z - shift) : 0.0f;
      total += e;
      out[i] = CAPPED && counts ? e * slope : e;
    }
    if (s) store_8(s + j, out);
  }

  if (!c.sums) return;
  total = over_block<Sum>(total, shared);
  if (threadIdx.x == 0) c.sums[int64_t(blockIdx.y) * c.n_rows + row] = total;
}

__global__ void add_sums_kernel(const float* sums, int64_t slabs, int64_t n_rows, double* total) {
  int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= n_rows) return;
  double sum = total[row];
  for (int64_t slab = 0; slab < slabs; slab++) sum += sums[slab * n_rows + row];
  total[row] = sum;
}

// One warp per row; products are exact in double.
__global__ void target_logits_kernel(Call call, double* target_logits) {
  int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= call.hidden.rows) return;
  int64_t y = call.targets[row];
  double sum = 0.0;
  for (int64_t h = threadIdx.x % 32; y >= 0 && h < call.hidden.columns; h += 32)
    sum += double(call.hidden.number(row, h)) * double(call.weight.number(y, h));
  sum = over_warp<Sum>(sum);

  if (threadIdx.x % 32) return;
  double slope, a = sum + (call.bias && y >= 0 ? call.bias[y] : 0.0f);
  target_logits[row] = y < 0 ? 0.0 : logit_double(call.head, call.softcap, call.temperature, a, &slope);
}

__global__ void begin_rows_kernel(const double* target_logits, int64_t n_rows, float* shift, double* total) {
  int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= n_rows) return;
  double z = target_logits[row];
  shift[row] = float(fabs(z) < double(INFINITY) ? z : 0.0);
  total[row] = 0.0;
}

__global__ void finish_rows_kernel(bool slice, const double* total, const double* target_logits, const float* shift,
                                   int64_t n_rows, float* logps, double* state) {
  int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= n_rows) return;
  state[2 * row] = total[row];
  state[2 * row + 1] = shift[row];
  if (slice) return;

  RowResult result = row_result(target_logits[row], rest_of_sum(total[row], shift[row]));
  logps[row] = float(result.logp);
  state[2 * row] = result.lse;
}

__global__ void begin_backward_kernel(Call call, const float* grad, const float* logps, const double* state,
                                      RowFactors out) {
  int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= call.hidden.rows) return;
  double lse = state[2 * row], k = state[2 * row + 1], logp = logps[row];
  RowFactor factor{float(k), gradient_factor(grad[row], call.head.gain, k, lse)};
  if (out.exact) factor = exact_factor(k, factor.r);
  out.r[row] = factor.r;
  out.shift[row] = factor.shift;

  double slope = slope_at(call.head, call.softcap, call.temperature, lse + logp);
  out.t[row] = call.targets[row] < 0 ? 0.0f : target_factor(grad[row], call.head.gain, logp, slope);
}

template <bool CAPPED>
void launch_exp_rows(const Chunk& c, dim3 grid, cudaStream_t stream) {
  if (c.bf16)
    SDPO_LAUNCH((exp_rows_kernel<CAPPED, uint16_t>), grid, THREADS, stream, c);
  else
    SDPO_LAUNCH((exp_rows_kernel<CAPPED, float>), grid, THREADS, stream, c);
}

}  // namespace

void exp_rows(const Chunk& c, cudaStream_t stream) {
  if (c.n_rows == 0 || c.padded == 0) return;
  dim3 grid(unsigned(c.n_rows), blocks_for(c.padded, SLAB));
  if (c.head.capped)
    launch_exp_rows<true>(c, grid, stream);
  else
    launch_exp_rows<false>(c, grid, stream);
  check_launch("exp_rows");
}

void add_sums(const float* sums, int64_t slabs, int64_t n_rows, double* total, cudaStream_t stream) {
  if (n_rows == 0) return;
  SDPO_LAUNCH((add_sums_kernel), blocks_for(n_rows, THREADS), THREADS, stream, sums, slabs, n_rows, total);
  check_launch("add_sums");
}

void target_logits(const Call& call, double* found, cudaStream_t stream) {
  if (call.hidden.rows == 0) return;
  SDPO_LAUNCH((target_logits_kernel), blocks_for(call.hidden.rows, THREADS / 32), THREADS, stream, call, found);
  check_launch("target_logits");
}

void begin_rows(const double* found, int64_t n_rows, float* shift, double* total, cudaStream_t stream) {
  if (n_rows == 0) return;
  SDPO_LAUNCH((begin_rows_kernel), blocks_for(n_rows, THREADS), THREADS, stream, found, n_rows, shift, total);
  check_launch("begin_rows");
}

void finish_rows(bool slice, const double* total, const double* found, const float* shift, int64_t n_rows, float* logps,
                 double* state, cudaStream_t stream) {
  if (n_rows == 0) return;
  SDPO_LAUNCH((finish_rows_kernel), blocks_for(n_rows, THREADS), THREADS, stream, slice, total, found, shift, n_rows,
              logps, state);
  check_launch("finish_rows");
}

void begin_backward(const Call& call, const float* grad, const float* logps, const double* state,
                    const RowFactors& factors, cudaStream_t stream) {
  if (call.hidden.rows == 0) return;
  SDPO_LAUNCH((begin_backward_kernel), blocks_for(call.hidden.rows, THREADS), THREADS, stream, call, grad, logps, state,
              factors);
  check_launch("begin_backward");
}

}  // namespace sdpo::cuda
