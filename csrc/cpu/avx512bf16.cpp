// Chips with AVX-512 and its bfloat16 dot product (Zen 4, Cooper Lake, Sapphire Rapids and later).
#if defined(__x86_64__)
#include <cmath>  // standard headers come before the target: their inline functions must not use these instructions
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#if defined(__clang__)  // which uses all 512 bits without being told
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#include "kernels.h"

#define SDPO_LANES 16
#define SDPO_TILE_VECTORS 4
#define SDPO_BF16_DOT 1

namespace sdpo::cpu {
namespace avx512bf16 {
namespace {
#include "gemm.inl"
#include "tasks.inl"
#include "rows.inl"
#include "table.inl"
}  // namespace
}  // namespace avx512bf16

const Kernels* avx512bf16_bf16() { return avx512bf16::table<avx512bf16::Bf16>("avx512bf16"); }
const Kernels* avx512bf16_f32() { return avx512bf16::table<avx512bf16::F32>("avx512bf16"); }

}  // namespace sdpo::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
