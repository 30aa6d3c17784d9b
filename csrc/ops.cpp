// The operators on the CPU, and the library's digest and chip.
#include "operators.h"

#include <string>

#include "cpu/chip.h"
#include "cpu/epilogue.h"
#include "cpu/leaves.h"
#include "cpu/logits.h"

namespace sdpo {

namespace {

cpu::Tiles make_tiles(const Tensor& bits, const MaybeTensor& row_of) {
  return {pointer<int64_t>(bits), bits.size(1), pointer<int64_t>(row_of)};
}

void linear_forward_with(cpu::RowExtras* extras, Tensor hidden, Tensor weight, MaybeTensor bias, Tensor targets,
                         double scale, double softcap, double temperature, bool bf16, MaybeTensor target_logits,
                         MaybeTensor logps, Tensor state, MaybeTensor stash, MaybeTensor direction, double grad_tol,
                         bool grad_tol_relative, MaybeTensor tiles) {
  const cpu::Kernels& kernels = cpu::kernels_for(bf16);
  cpu::Leaves leaves(kernels, extras);
  if (tiles) leaves.keep_sums();
  Kept kept = make_kept(stash, kernels.bf16, stash ? stash->size(0) : 0, std::nullopt, direction);
  forward(leaves, make_call(hidden, weight, bias, targets, scale, softcap, temperature, bf16, target_logits), kept,
          pointer<float>(logps), pointer<double>(state));
  if (tiles) leaves.choose_tiles(grad_tol, grad_tol_relative, pointer<double>(state), make_tiles(*tiles, std::nullopt));
}

void linear_forward(Tensor hidden, Tensor weight, MaybeTensor bias, Tensor targets, double scale, double softcap,
                    double temperature, bool bf16, MaybeTensor target_logits, MaybeTensor logps, Tensor state,
                    MaybeTensor stash, MaybeTensor direction) {
  linear_forward_with(nullptr, hidden, weight, bias, targets, scale, softcap, temperature, bf16, target_logits, logps,
                      state, stash, direction, 0.0, false, std::nullopt);
}

void linear_forward_more(Tensor hidden, Tensor weight, MaybeTensor bias, Tensor targets, double scale, double softcap,
                         double temperature, bool bf16, MaybeTensor target_logits, MaybeTensor logps, Tensor state,
                         MaybeTensor stash, MaybeTensor direction, MaybeTensor extras, double grad_tol,
                         bool grad_tol_relative, MaybeTensor tiles) {
  static_assert(sizeof(cpu::RowExtras) == 6 * sizeof(double));
  linear_forward_with(pointer<cpu::RowExtras>(extras), hidden, weight, bias, targets, scale, softcap, temperature, bf16,
                      target_logits, logps, state, stash, direction, grad_tol, grad_tol_relative, tiles);
}

void target_logits(Tensor hidden, Tensor weight, MaybeTensor bias, Tensor targets, double scale, double softcap,
                   double temperature, bool bf16, Tensor out) {
  cpu::target_logits(make_call(hidden, weight, bias, targets, scale, softcap, temperature, bf16), pointer<double>(out));
}

void linear_backward_tiles(Tensor hidden, Tensor weight, MaybeTensor bias, Tensor targets, double scale, double softcap,
                           double temperature, bool bf16, Tensor logps, Tensor state, MaybeTensor stash,
                           MaybeTensor row_of, Tensor grad, Tensor weight_hidden, MaybeTensor grad_hidden,
                           MaybeTensor grad_weight, MaybeTensor grad_bias, MaybeTensor tiles) {
  const cpu::Kernels& kernels = cpu::kernels_for(bf16);
  cpu::Leaves leaves(kernels);
  if (tiles) leaves.take(make_tiles(*tiles, row_of));
  Kept kept = make_kept(stash, kernels.bf16, stash ? stash->size(0) : 0, row_of, std::nullopt);
  Gradients wanted{pointer<void>(grad_hidden), pointer<void>(grad_weight), pointer<float>(grad_bias),
                   matrix(weight_hidden, bf16)};
  backward(leaves, make_call(hidden, weight, bias, targets, scale, softcap, temperature, bf16), kept,
           pointer<float>(logps), pointer<double>(state), pointer<float>(grad), wanted);
}

void linear_backward(Tensor hidden, Tensor weight, MaybeTensor bias, Tensor targets, double scale, double softcap,
                     double temperature, bool bf16, Tensor logps, Tensor state, MaybeTensor stash, MaybeTensor row_of,
                     Tensor grad, Tensor weight_hidden, MaybeTensor grad_hidden, MaybeTensor grad_weight,
                     MaybeTensor grad_bias) {
  linear_backward_tiles(hidden, weight, bias, targets, scale, softcap, temperature, bf16, logps, state, stash, row_of,
                        grad, weight_hidden, grad_hidden, grad_weight, grad_bias, std::nullopt);
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
  define_operators(m);
  m.def(
      "linear_forward_more(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float softcap, "
      "float temperature, bool bf16, Tensor? target_logits, Tensor(a!)? logps, Tensor(b!) state, Tensor(c!)? stash, "
      "Tensor(d!)? direction, Tensor(e!)? extras, float grad_tol, bool grad_tol_relative, Tensor(f!)? tiles) -> ()");
  m.def(
      "linear_backward_tiles(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float softcap, "
      "float temperature, bool bf16, Tensor logps, Tensor state, Tensor? stash, Tensor? row_of, Tensor grad, "
      "Tensor weight_hidden, Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, "
      "Tensor? tiles) -> ()");
  m.def("built_from() -> str");
  m.def("cuda_built_from() -> str");
  m.def("cuda_refuses(int device) -> str");
  m.def("cpu_chip() -> str");
  m.def("use_cpu_chip(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sdpo_native, CPU, m) {
  m.impl("target_logits", TORCH_BOX(&target_logits));
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_forward_more", TORCH_BOX(&linear_forward_more));
  m.impl("linear_backward_tiles", TORCH_BOX(&linear_backward_tiles));
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
