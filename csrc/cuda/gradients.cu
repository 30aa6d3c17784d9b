// Kernels around the two products of the backward: r ⊙ X before, r ⊙ ΣS·W + t ⊙ W[y] after, column sums of S for the
// bias.
//
// Register budget: 48.
#include "device.cuh"
#include "kernels.h"

namespace sdpo::cuda {

namespace {

constexpr int THREADS = 256;
constexpr int ROWS_AT_ONCE = THREADS / 32;

__global__ void convert_rows_kernel(Matrix from, void* out, bool bf16) {
  int64_t row = blockIdx.x;
  for (int64_t h = threadIdx.x; h < from.columns; h += blockDim.x)
    store_number(out, bf16, row * from.columns + h, from.number(row, h));
}

__global__ void scale_rows_kernel(Matrix x, const float* r, void* out) {
  int64_t row = blockIdx.x;
  for (int64_t h = threadIdx.x; h < x.columns; h += blockDim.x)
    store_number(out, x.bf16, row * x.columns + h, x.number(row, h) * r[row]);
}

__global__ void finish_hidden_kernel(Call call, const float* sum, const float* r, const float* t, void* out) {
  int64_t row = blockIdx.x, width = call.hidden.columns, target = call.targets[row];
  for (int64_t h = threadIdx.x; h < width; h += blockDim.x) {
    float value = r[row] * sum[row * width + h];
    if (target >= 0) value += t[row] * call.weight.number(target, h);
    store_number(out, call.hidden.bf16, row * width + h, value);
  }
}

__global__ void add_kernel(float* sum, const float* part, int64_t count) {
  int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) sum[i] += part[i];
}

// A block sums 32 pairs of columns; each warp takes every eighth row, and the warps' sums are added in a fixed order.
template <class Element>
__global__ void __launch_bounds__(THREADS)
    bias_gradient_kernel(const Element* s, int64_t s_stride, const float* r, Targets targets, int64_t n_rows,
                         int64_t first, int64_t columns, float* out) {
  __shared__ double shared[ROWS_AT_ONCE][64];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t j = int64_t(blockIdx.x) * 64 + 2 * lane;  // S has whole blocks of 64 columns
  double low = 0.0, high = 0.0;
  for (int64_t row = warp; row < n_rows; row += ROWS_AT_ONCE) {
    const Element* at = s + row * s_stride + j;
    float two[2];
    if constexpr (sizeof(Element) == 2) {
      uint32_t bits = *reinterpret_cast<const uint32_t*>(at);
      two[0] = float_of_bits(bits << 16), two[1] = float_of_bits(bits & 0xffff0000u);
    } else {
      float2 both = *reinterpret_cast<const float2*>(at);
      two[0] = both.x, two[1] = both.y;
    }
    low += double(two[0]) * r[row], high += double(two[1]) * r[row];
  }

  shared[warp][2 * lane] = low, shared[warp][2 * lane + 1] = high;
  __syncthreads();

  int64_t column = int64_t(blockIdx.x) * 64 + threadIdx.x;
  if (threadIdx.x >= 64 || column >= columns) return;
  double sum = 0.0;
  for (int i = 0; i < ROWS_AT_ONCE; i++) sum += shared[i][threadIdx.x];
  for (int64_t at = targets.first_from(first + column); targets.is_before(at, first + column + 1); at++)
    sum += targets.t[targets.rows[at]];
  out[column] = float(sum);
}

__global__ void finish_direction_kernel(Call call, const float* hidden_sum, const float* logps, const double* state,
                                        float* direction) {
  int64_t row = blockIdx.x, width = call.hidden.columns, target = call.targets[row];
  double lse = state[2 * row], logp = logps[row];
  double slope = slope_at(call.head, call.softcap, call.temperature, lse + logp);
  DirectionFactors by = direction_factors(call.head.gain, logp, lse, state[2 * row + 1], slope);

  for (int64_t h = threadIdx.x; h < width; h += blockDim.x) {
    int64_t at = row * width + h;
    direction[at] = by.of_sum * hidden_sum[at] + by.of_target * call.weight.number(target, h);
  }
}

}  // namespace

std::string why_not() {
#if defined(SDPO_EMULATED)
  return "";
#else
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver < runtime)
    return "its kernels need a driver for CUDA " + std::to_string(runtime / 1000) + ", this one is for CUDA " +
           std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, add_kernel);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
#endif
}

void convert_rows(const Matrix& from, void* out, bool bf16, cudaStream_t stream) {
  if (from.rows == 0 || from.columns == 0) return;
  SDPO_LAUNCH((convert_rows_kernel), unsigned(from.rows), THREADS, stream, from, out, bf16);
  check_launch("convert_rows");
}

void scale_rows(const Matrix& x, const float* r, void* out, cudaStream_t stream) {
  if (x.rows == 0 || x.columns == 0) return;
  SDPO_LAUNCH((scale_rows_kernel), unsigned(x.rows), THREADS, stream, x, r, out);
  check_launch("scale_rows");
}

void finish_hidden(const Call& call, const float* sum, const float* r, const float* t, void* out, cudaStream_t stream) {
  if (call.hidden.rows == 0 || call.hidden.columns == 0) return;
  SDPO_LAUNCH((finish_hidden_kernel), unsigned(call.hidden.rows), THREADS, stream, call, sum, r, t, out);
  check_launch("finish_hidden");
}

void add(float* sum, const float* part, int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  unsigned blocks = unsigned(count / THREADS + 1 < 4096 ? count / THREADS + 1 : 4096);
  SDPO_LAUNCH((add_kernel), blocks, THREADS, stream, sum, part, count);
  check_launch("add");
}

void bias_gradient(const void* s, int64_t s_stride, bool bf16, const float* r, const Targets& targets, int64_t n_rows,
                   int64_t first, int64_t columns, float* out, cudaStream_t stream) {
  if (columns == 0) return;
  unsigned blocks = blocks_for(columns, 64);
  if (bf16)
    SDPO_LAUNCH((bias_gradient_kernel), blocks, THREADS, stream, static_cast<const uint16_t*>(s), s_stride, r, targets,
                n_rows, first, columns, out);
  else
    SDPO_LAUNCH((bias_gradient_kernel), blocks, THREADS, stream, static_cast<const float*>(s), s_stride, r, targets,
                n_rows, first, columns, out);
  check_launch("bias_gradient");
}

void finish_direction(const Call& call, const float* hidden_sum, const float* logps, const double* state,
                      float* direction, cudaStream_t stream) {
  if (call.hidden.rows == 0 || call.hidden.columns == 0) return;
  SDPO_LAUNCH((finish_direction_kernel), unsigned(call.hidden.rows), THREADS, stream, call, hidden_sum, logps, state,
              direction);
  check_launch("finish_direction");
}

}  // namespace sdpo::cuda
