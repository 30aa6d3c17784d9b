// Chips with AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>  // standard headers come before the target: their inline functions must not use these instructions
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "kernels.h"

#define SDPO_LANES 8
#define SDPO_TILE_VECTORS 2
#define SDPO_BF16_DOT 0

namespace sdpo::cpu {
namespace avx2 {
namespace {
#include "gemm.inl"
#include "tasks.inl"
#include "rows.inl"
#include "table.inl"
}  // namespace
}  // namespace avx2

const Kernels* avx2_f32() { return avx2::table<avx2::F32>("avx2"); }

}  // namespace sdpo::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
