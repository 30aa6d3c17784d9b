// Any chip: compiled for the build's default target.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define SDPO_LANES 4
#define SDPO_TILE_VECTORS 2
#define SDPO_BF16_DOT 0

namespace sdpo::cpu {
namespace base {
namespace {
#include "gemm.inl"
#include "tasks.inl"
#include "rows.inl"
#include "table.inl"
}  // namespace
}  // namespace base

const Kernels* base_f32() { return base::table<base::F32>("base"); }

}  // namespace sdpo::cpu
