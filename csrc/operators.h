// The operators of the native backend for every device: their schemas, and the conversion from tensors to the
// structures of call.h. They check little (sdpo_kernels/backends/native.py calls them) and write into tensors that the
// caller allocated.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

#include "call.h"

namespace sdpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// `round`: float numbers are rounded to bfloat16 when read.
inline Matrix matrix(const Tensor& t, bool round = false) {
  if (t.scalar_type() != ScalarType::BFloat16 && t.scalar_type() != ScalarType::Float)
    throw std::runtime_error("sdpo_kernels: the native kernels take float32 and bfloat16");
  bool bf16 = t.scalar_type() == ScalarType::BFloat16;
  return {t.data_ptr(), t.size(0), t.size(1), t.stride(0), bf16, round && !bf16};
}

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* pointer(const MaybeTensor& t) {
  return t ? pointer<T>(*t) : nullptr;
}

inline Call make_call(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias, const Tensor& targets,
                      double scale, double softcap, double temperature, bool bf16,
                      const MaybeTensor& target_logits = std::nullopt) {
  return {matrix(hidden, bf16),
          matrix(weight, bf16),
          pointer<float>(bias),
          pointer<int64_t>(targets),
          make_head(scale, softcap, temperature),
          softcap,
          temperature,
          pointer<double>(target_logits)};
}

inline Kept make_kept(const MaybeTensor& stash, bool bf16, int64_t stash_rows, const MaybeTensor& row_of,
                      const MaybeTensor& direction) {
  Kept kept{0, {}, pointer<float>(direction)};
  if (!stash) return kept;

  bool fits = stash->scalar_type() == (bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  if (!fits) throw std::runtime_error("sdpo_kernels: the stash is not of the dtype that this chip's kernels multiply");
  kept.blocks = stash->size(1) / PANEL;
  kept.stash = {stash->data_ptr(), stash_rows, pointer<int64_t>(row_of), 0};
  return kept;
}

template <class Library>
void define_operators(Library& m) {
  m.def(
      "target_logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float softcap, "
      "float temperature, bool bf16, Tensor(a!) out) -> ()");
  // with `target_logits` the head is a slice: `state` is then what walk.h says, and `logps` is not written
  m.def(
      "linear_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float softcap, "
      "float temperature, bool bf16, Tensor? target_logits, Tensor(a!)? logps, Tensor(b!) state, Tensor(c!)? stash, "
      "Tensor(d!)? direction) -> ()");
  m.def(
      "linear_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float softcap, "
      "float temperature, bool bf16, Tensor logps, Tensor state, Tensor? stash, Tensor? row_of, Tensor grad, "
      "Tensor weight_hidden, Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()");
  m.def("logits_forward(Tensor logits, Tensor targets, float temperature, Tensor(a!) logps, Tensor(b!) lse) -> ()");
  m.def(
      "logits_backward(Tensor grad, Tensor logits, Tensor targets, Tensor logps, Tensor lse, float temperature, "
      "Tensor(a!) out) -> ()");
  m.def(
      "pair_epilogue(Tensor logps, Tensor? index, Tensor? segment, Tensor ref, Tensor counts, int loss_type, float "
      "beta, "
      "float smoothing, Tensor(a!) loss, Tensor(b!) sums, Tensor(c!) metrics, Tensor(d!) slopes) -> ()");
}

}  // namespace sdpo
