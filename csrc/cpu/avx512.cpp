// Chips with AVX-512 but no bfloat16 dot product (Skylake to Ice Lake).
#if defined(__x86_64__)
#include <cmath>  // standard headers come before the target: their inline functions must not use these instructions
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#if defined(__clang__)  // which uses all 512 bits without being told
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
#include "kernels.h"

#define SDPO_LANES 16
#define SDPO_TILE_VECTORS 4
#define SDPO_BF16_DOT 0

namespace sdpo::cpu {
namespace avx512 {
namespace {
#include "gemm.inl"
#include "tasks.inl"
#include "rows.inl"
#include "table.inl"
}  // namespace
}  // namespace avx512

const Kernels* avx512_f32() { return avx512::table<avx512::F32>("avx512"); }

}  // namespace sdpo::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
