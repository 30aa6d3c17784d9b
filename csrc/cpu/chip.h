// Chooses which of the compiled kernels this machine runs.
#pragma once

#include <string>

#include "kernels.h"

namespace sdpo::cpu {

// The kernels for operands rounded to bfloat16 (or float32). On a chip without a bfloat16 dot product they are the
// float32 ones, which take bfloat16 matrices as well.
const Kernels& kernels_for(bool bf16);

std::string chip();                      // "avx512bf16", "avx512", "avx2" or "base"
void use_chip(const std::string& name);  // for tests: one that this machine supports

}  // namespace sdpo::cpu
