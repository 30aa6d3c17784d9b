// The operators on CUDA. Their schemas are defined by the CPU library (../ops.cpp), which is loaded first.
#include "../operators.h"

#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "leaves.h"

#if defined(SDPO_EMULATED)  // the tests' emulator of CUDA, on CPU tensors and in a namespace of its own
#define SDPO_NAMESPACE sdpo_emulated
#define SDPO_KEY CPU
#else
#define SDPO_NAMESPACE sdpo_native
#define SDPO_KEY CUDA
#endif

namespace sdpo {

namespace {

// A pointer of another device would be read as one of this device.
#if defined(SDPO_EMULATED)
template <class... Tensors>
void same_device(const Tensors&...) {}
#else
void require_device(const Tensor& t, int device) {
  if (!t.is_cuda() || t.get_device_index() != device)
    throw std::runtime_error("sdpo_kernels: all tensors of a call must be on one CUDA device");
}
void require_device(const MaybeTensor& t, int device) {
  if (t) require_device(*t, device);
}
template <class... Tensors>
void same_device(const Tensor& first, const Tensors&... others) {
  (require_device(others, first.get_device_index()), ...);
}
#endif

// Makes the device of a call's tensors the current one for the duration of the call.
struct On {
#if defined(SDPO_EMULATED)
  explicit On(const Tensor&) {}
  int device = 0;
#else
  explicit On(const Tensor& t) : device(t.get_device_index()), guard(device) {}
  int device;
  torch::stable::accelerator::DeviceGuard guard;
#endif
  cudaStream_t stream() const { return cuda::Host(device).stream(); }
};

Kept on_cuda(Kept kept, const MaybeTensor& stash) {
  if (stash) kept.stash.stride = stash->stride(0);
  return kept;
}

void linear_forward(Tensor hidden, Tensor weight, MaybeTensor bias, Tensor targets, double scale, double softcap,
                    double temperature, bool bf16, MaybeTensor target_logits, MaybeTensor logps, Tensor state,
                    MaybeTensor stash, MaybeTensor direction) {
  same_device(hidden, weight, bias, targets, target_logits, logps, state, stash, direction);
  On on(hidden);
  cuda::Leaves leaves(on.device, bf16);
  Kept kept = on_cuda(make_kept(stash, bf16, hidden.size(0), std::nullopt, direction), stash);
  forward(leaves, make_call(hidden, weight, bias, targets, scale, softcap, temperature, bf16, target_logits), kept,
          pointer<float>(logps), pointer<double>(state));
}

void target_logits(Tensor hidden, Tensor weight, MaybeTensor bias, Tensor targets, double scale, double softcap,
                   double temperature, bool bf16, Tensor out) {
  same_device(hidden, weight, bias, targets, out);
  On on(hidden);
  cuda::target_logits(make_call(hidden, weight, bias, targets, scale, softcap, temperature, bf16), pointer<double>(out),
                      on.stream());
}

// `row_of` must be absent: on CUDA the caller gathers the rows.
void linear_backward(Tensor hidden, Tensor weight, MaybeTensor bias, Tensor targets, double scale, double softcap,
                     double temperature, bool bf16, Tensor logps, Tensor state, MaybeTensor stash, MaybeTensor row_of,
                     Tensor grad, Tensor weight_hidden, MaybeTensor grad_hidden, MaybeTensor grad_weight,
                     MaybeTensor grad_bias) {
  if (row_of) throw std::runtime_error("sdpo_kernels: row_of: must be None on CUDA");
  same_device(hidden, weight, bias, targets, logps, state, stash, grad, weight_hidden, grad_hidden, grad_weight,
              grad_bias);
  On on(hidden);
  cuda::Leaves leaves(on.device, bf16);
  Kept kept = on_cuda(make_kept(stash, bf16, hidden.size(0), std::nullopt, std::nullopt), stash);
  Gradients wanted{pointer<void>(grad_hidden), pointer<void>(grad_weight), pointer<float>(grad_bias),
                   matrix(weight_hidden, bf16)};
  backward(leaves, make_call(hidden, weight, bias, targets, scale, softcap, temperature, bf16), kept,
           pointer<float>(logps), pointer<double>(state), pointer<float>(grad), wanted);
}

void logits_forward(Tensor logits, Tensor targets, double temperature, Tensor logps, Tensor lse) {
  same_device(logits, targets, logps, lse);
  On on(logits);
  cuda::logits_forward(matrix(logits), pointer<int64_t>(targets), temperature, pointer<float>(logps),
                       pointer<double>(lse), on.stream());
}

void logits_backward(Tensor grad, Tensor logits, Tensor targets, Tensor logps, Tensor lse, double temperature,
                     Tensor out) {
  same_device(logits, grad, targets, logps, lse, out);
  On on(logits);
  cuda::logits_backward(matrix(logits), pointer<int64_t>(targets), temperature, pointer<float>(logps),
                        pointer<double>(lse), pointer<float>(grad), out.data_ptr(), on.stream());
}

// `segment` ascends: the caller sorts it.
void pair_epilogue(Tensor logps, MaybeTensor index, MaybeTensor segment, Tensor ref, Tensor counts, int64_t loss_type,
                   double beta, double smoothing, Tensor loss, Tensor sums, Tensor metrics, Tensor slopes) {
  same_device(logps, index, segment, ref, counts, loss, sums, metrics, slopes);
  On on(logps);
  cuda::pair_epilogue(
      {pointer<float>(logps), pointer<int64_t>(index), pointer<int64_t>(segment), index ? index->size(0) : 0,
       ref.size(0) / 2, pointer<float>(ref), pointer<int64_t>(counts), loss_type, beta, smoothing, pointer<float>(loss),
       pointer<float>(sums), pointer<float>(metrics), pointer<float>(slopes)},
      on.stream());
}

std::string built_from() { return SDPO_BUILT_FROM; }

std::string refuses(int64_t device) {
#if !defined(SDPO_EMULATED)
  torch::stable::accelerator::DeviceGuard guard(static_cast<torch::stable::accelerator::DeviceIndex>(device));
#endif
  return cuda::why_not();
}

}  // namespace

#if defined(SDPO_EMULATED)
STABLE_TORCH_LIBRARY(SDPO_NAMESPACE, m) {
  define_operators(m);
  m.def("cuda_built_from() -> str");
  m.def("cuda_refuses(int device) -> str");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(SDPO_NAMESPACE, SDPO_KEY, m) {
  m.impl("target_logits", TORCH_BOX(&target_logits));
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("logits_forward", TORCH_BOX(&logits_forward));
  m.impl("logits_backward", TORCH_BOX(&logits_backward));
  m.impl("pair_epilogue", TORCH_BOX(&pair_epilogue));
}

STABLE_TORCH_LIBRARY_IMPL(SDPO_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_built_from", TORCH_BOX(&built_from));
  m.impl("cuda_refuses", TORCH_BOX(&refuses));
}

}  // namespace sdpo
