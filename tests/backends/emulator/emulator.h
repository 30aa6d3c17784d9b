// CUDA on the CPU, as far as csrc/cuda needs it: a block's threads are fibers of one thread, and blocks run one after
// the other. Every thread runs until a barrier or a shuffle, so that a missing barrier is noticed. Slow, exact, no GPU.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct __nv_bfloat162 {
  uint16_t x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using cudaError_t = int;
constexpr int cudaSuccess = 0;
inline int cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(int) { return ""; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t STACK = 128 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  int waits_for = 0;  // 0: nothing, 1: its block, 2: its warp
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
inline uint64_t exchanged[32 * 32];  // values that the lanes of up to 32 warps exchange

inline void start() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void wait(int what) {
  fibers[current].waits_for = what;
  swapcontext(&fibers[current].context, &scheduler);
}

// If all running threads from `first` to `last` wait for `what`, releases them and returns true.
inline bool release(unsigned first, unsigned last, int what) {
  bool any = false;
  for (unsigned t = first; t < last; t++) {
    if (fibers[t].done) continue;
    if (fibers[t].waits_for != what) return false;
    any = true;
  }
  for (unsigned t = first; t < last; t++)
    if (!fibers[t].done) fibers[t].waits_for = 0;
  return any;
}

inline void run_block(unsigned threads) {
  fibers.clear();
  fibers.resize(threads);
  for (auto& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.stack.reset(new char[STACK]);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  for (;;) {
    bool ran = false, alive = false;
    for (unsigned t = threads; t-- > 0;) {  // backwards: code that relies on lane 0 being first fails here
      if (fibers[t].done) continue;
      alive = true;
      if (fibers[t].waits_for) continue;
      current = t;
      threadIdx = dim3(t);
      swapcontext(&scheduler, &fibers[t].context);
      ran = true;
    }
    if (!alive) return;
    bool freed = release(0, threads, 1);
    for (unsigned warp = 0; warp < threads; warp += 32) freed |= release(warp, std::min(warp + 32, threads), 2);
    if (!ran && !freed) throw std::runtime_error("emulator: threads of a block wait for different things");
  }
}

template <class F>
void launch(dim3 grid, unsigned threads, const F& kernel) {
  gridDim = grid, blockDim = dim3(threads);
  body = kernel;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = dim3(x, y, z);
        run_block(threads);
      }
}

}  // namespace emulator

#define SDPO_LAUNCH(kernel, grid, threads, stream, ...) \
  ((void)(stream), emulator::launch(grid, threads, [&] { kernel(__VA_ARGS__); }))

inline void __syncthreads() { emulator::wait(1); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) <= 8);
  unsigned me = emulator::current;
  emulator::exchanged[me] = 0;
  memcpy(&emulator::exchanged[me], &value, sizeof value);
  emulator::wait(2);
  T other;
  memcpy(&other, &emulator::exchanged[me ^ unsigned(mask)], sizeof other);
  emulator::wait(2);  // before any lane writes the next value
  return other;
}

#include "../../../csrc/row_math.h"

inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {sdpo::bf16_of_float(low), sdpo::bf16_of_float(high)};
}
