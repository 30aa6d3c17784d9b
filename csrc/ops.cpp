// The native backend's operators on the CPU: schemas, and from tensors to the structures of walk.h. They check nothing
// (sdpo_kernels/backends/native.py calls them) and write into tensors that the caller has made.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/chip.h"
#include "cpu/leaves.h"
#include "cpu/logits.h"
#include "cpu/pair.h"

namespace sdpo {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// `round`: float numbers are to be rounded to bfloat16.
Matrix matrix(const Tensor& t, bool round = false) {
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

Call make_call(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias, const Tensor& targets, double scale,
               double softcap, double temperature, bool bf16) {
  return {matrix(hidden, bf16),
          matrix(weight, bf16),
          pointer<float>(bias),
          pointer<int64_t>(targets),
          make_head(scale, softcap, temperature),
          softcap,
          temperature};
}

Kept make_kept(const MaybeTensor& stash, bool bf16, int64_t stash_rows, const MaybeTensor& row_of,
               const MaybeTensor& direction) {
  Kept kept{0, {}, pointer<float>(direction)};
  if (!stash) return kept;
  bool fits = stash->scalar_type() == (bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  if (!fits) throw std::runtime_error("sdpo_kernels: the stash is not of the dtype that this chip's kernels multiply");
  kept.blocks = stash->size(1) / PANEL;
  kept.stash = {stash->data_ptr(), stash_rows, pointer<int64_t>(row_of)};
  return kept;
}

void linear_forward(Tensor hidden, Tensor weight, MaybeTensor bias, Tensor targets, double scale, double softcap,
                    double temperature, bool bf16, Tensor logps, Tensor state, MaybeTensor stash,
                    MaybeTensor direction) {
  const cpu::Kernels& kernels = cpu::kernels_for(bf16);
  cpu::Leaves leaves(kernels);
  Kept kept = make_kept(stash, kernels.bf16, stash ? stash->size(0) : 0, std::nullopt, direction);
  forward(leaves, make_call(hidden, weight, bias, targets, scale, softcap, temperature, bf16), kept,
          pointer<float>(logps), pointer<double>(state));
}

void linear_backward(Tensor hidden, Tensor weight, MaybeTensor bias, Tensor targets, double scale, double softcap,
                     double temperature, bool bf16, Tensor logps, Tensor state, MaybeTensor stash, MaybeTensor row_of,
                     Tensor grad, MaybeTensor grad_hidden, MaybeTensor grad_weight, MaybeTensor grad_bias) {
  const cpu::Kernels& kernels = cpu::kernels_for(bf16);
  cpu::Leaves leaves(kernels);
  Kept kept = make_kept(stash, kernels.bf16, stash ? stash->size(0) : 0, row_of, std::nullopt);
  Gradients wanted{pointer<void>(grad_hidden), pointer<void>(grad_weight), pointer<float>(grad_bias)};
  backward(leaves, make_call(hidden, weight, bias, targets, scale, softcap, temperature, bf16), kept,
           pointer<float>(logps), pointer<double>(state), pointer<float>(grad), wanted);
}

void logits_forward(Tensor logits, Tensor targets, double temperature, Tensor logps, Tensor lse) {
  cpu::logits_forward(cpu::kernels_for(false), matrix(logits), pointer<int64_t>(targets), temperature,
                      pointer<float>(logps), pointer<double>(lse));
}

void logits_backward(Tensor grad, Tensor logits, Tensor targets, Tensor logps, Tensor lse, double temperature,
                     Tensor out) {
  cpu::logits_backward(cpu::kernels_for(false), matrix(logits), pointer<int64_t>(targets), temperature,
                       pointer<float>(logps), pointer<double>(lse), pointer<float>(grad), out.data_ptr());
}

void pair_epilogue(Tensor logps, MaybeTensor index, MaybeTensor segment, Tensor ref, Tensor counts, int64_t loss_type,
                   double beta, double smoothing, Tensor loss, Tensor sums, Tensor metrics, Tensor slopes) {
  cpu::Pairs pairs{pointer<float>(logps),
                   pointer<int64_t>(index),
                   pointer<int64_t>(segment),
                   logps.size(0),
                   index ? index->size(0) : 0,
                   ref.size(0) / 2,
                   pointer<float>(ref),
                   pointer<int64_t>(counts),
                   loss_type,
                   beta,
                   smoothing};
  cpu::pair_epilogue(pairs, pointer<float>(loss), pointer<float>(sums), pointer<float>(metrics),
                     pointer<float>(slopes));
}

std::string built_from() { return SDPO_BUILT_FROM; }
std::string chip() { return cpu::chip(); }
void use_chip(std::string name) { cpu::use_chip(name); }

}  // namespace

STABLE_TORCH_LIBRARY(sdpo_native, m) {
  m.def(
      "linear_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float softcap, "
      "float temperature, bool bf16, Tensor(a!) logps, Tensor(b!) state, Tensor(c!)? stash, Tensor(d!)? direction) -> "
      "()");
  m.def(
      "linear_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float softcap, "
      "float temperature, bool bf16, Tensor logps, Tensor state, Tensor? stash, Tensor? row_of, Tensor grad, "
      "Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()");
  m.def("logits_forward(Tensor logits, Tensor targets, float temperature, Tensor(a!) logps, Tensor(b!) lse) -> ()");
  m.def(
      "logits_backward(Tensor grad, Tensor logits, Tensor targets, Tensor logps, Tensor lse, float temperature, "
      "Tensor(a!) out) -> ()");
  m.def(
      "pair_epilogue(Tensor logps, Tensor? index, Tensor? segment, Tensor ref, Tensor counts, int loss_type, float "
      "beta, "
      "float smoothing, Tensor(a!) loss, Tensor(b!) sums, Tensor(c!) metrics, Tensor(d!) slopes) -> ()");
  m.def("built_from() -> str");
  m.def("cpu_chip() -> str");
  m.def("use_cpu_chip(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sdpo_native, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("logits_forward", TORCH_BOX(&logits_forward));
  m.impl("logits_backward", TORCH_BOX(&logits_backward));
  m.impl("pair_epilogue", TORCH_BOX(&pair_epilogue));
}

STABLE_TORCH_LIBRARY_IMPL(sdpo_native, CompositeExplicitAutograd, m) {
  m.impl("built_from", TORCH_BOX(&built_from));
  m.impl("cpu_chip", TORCH_BOX(&chip));
  m.impl("use_cpu_chip", TORCH_BOX(&use_chip));
}

}  // namespace sdpo
