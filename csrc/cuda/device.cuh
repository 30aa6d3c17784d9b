// Shared by all kernel files: loads and stores, sums over a warp and a block, launch checks.
#pragma once

#if defined(SDPO_EMULATED)  // the tests' stand-in for CUDA on the CPU, tests/backends/emulator
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#define SDPO_LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif

#include <stdexcept>
#include <string>

#include "../row_math.h"

namespace sdpo::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;

inline void check_launch(const char* name) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("sdpo_kernels: at or before ") + name + ": " + cudaGetErrorString(error));
}

inline unsigned blocks_for(int64_t count, int64_t per_block) { return unsigned((count + per_block - 1) / per_block); }

struct Sum {
  template <class T>
  static __device__ T combine(T a, T b) {
    return a + b;
  }
};

struct Max {  // a NaN is kept
  static __device__ float combine(float a, float b) { return a > b || a != a ? a : b; }
};

// Every lane gets the result; the order of operations is fixed.
template <class Op, class T>
__device__ T over_warp(T value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = Op::combine(value, __shfl_xor_sync(ALL_LANES, value, step));
  return value;
}

// Every thread of the block gets the result; `shared` holds one number per warp.
template <class Op, class T>
__device__ T over_block(T value, T* shared) {
  value = over_warp<Op>(value);
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();  // the previous sum may still be reading `shared`
  if (threadIdx.x % 32 == 0) shared[warp] = value;
  __syncthreads();
  T result = shared[0];
  for (int i = 1; i < warps; i++) result = Op::combine(result, shared[i]);
  return result;
}

// Two numbers as two bfloat16 in one word, rounded to nearest even.
__device__ inline uint32_t pair_of(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

__device__ inline void store_number(void* out, bool bf16, int64_t at, float value) {
  if (bf16)
    static_cast<uint16_t*>(out)[at] = bf16_of_float(value);
  else
    static_cast<float*>(out)[at] = value;
}

// 8 numbers at `from`, aligned to their size.
__device__ inline void load_8(const float* from, float* to) {
  float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

__device__ inline void load_8(const uint16_t* from, float* to) {
  uint4 bits = *reinterpret_cast<const uint4*>(from);
  uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[2 * i] = float_of_bits(words[i] << 16);
    to[2 * i + 1] = float_of_bits(words[i] & 0xffff0000u);
  }
}

__device__ inline void store_8(float* to, const float* from) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  *reinterpret_cast<float4*>(to + 4) = make_float4(from[4], from[5], from[6], from[7]);
}

__device__ inline void store_8(uint16_t* to, const float* from) {
  *reinterpret_cast<uint4*>(to) = make_uint4(pair_of(from[0], from[1]), pair_of(from[2], from[3]),
                                             pair_of(from[4], from[5]), pair_of(from[6], from[7]));
}

}  // namespace sdpo::cuda
