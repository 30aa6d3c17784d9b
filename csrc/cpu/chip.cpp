#include "chip.h"

#include <atomic>
#include <stdexcept>

namespace sdpo::cpu {

namespace {

struct Chip {
  const char* name;
  bool (*here)();
  const Kernels* (*bf16)();
  const Kernels* (*f32)();
};

const Chip CHIPS[] = {
// best first
#if defined(__x86_64__)
    {"avx512bf16",
     [] {
       return bool(__builtin_cpu_supports("avx512bf16")) && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     avx512bf16_bf16, avx512bf16_f32},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512dq");
     },
     avx512_f32, avx512_f32},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2_f32, avx2_f32},
#endif
    {"base", [] { return true; }, base_f32, base_f32},
};

const Chip* best() {
  for (const Chip& chip : CHIPS)
    if (chip.here()) return &chip;
  return nullptr;  // never reached: the last one runs everywhere
}

std::atomic<const Chip*>& current() {
  static std::atomic<const Chip*> chip{best()};
  return chip;
}

}  // namespace

const Kernels& kernels_for(bool bf16) { return *(bf16 ? current().load()->bf16() : current().load()->f32()); }

std::string chip() { return current().load()->name; }

void use_chip(const std::string& name) {
  for (const Chip& chip : CHIPS)
    if (name == chip.name && chip.here()) {
      current() = &chip;
      return;
    }
  throw std::runtime_error("chip: was '" + name + "', must be one that this machine has, at best '" + best()->name +
                           "'");
}

}  // namespace sdpo::cpu
