// torch on CUDA through its stable ABI: memory from its allocator, its current stream, its matrix products.
#include "host.h"

#include <torch/csrc/stable/ops.h>

#include <array>

namespace sdpo::cuda {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType type_of(const View& v) { return v.bf16 ? ScalarType::BFloat16 : ScalarType::Float; }

Tensor tensor_of(const View& v, int device) {
  std::array<int64_t, 2> sizes{v.rows, v.columns}, strides{v.row_stride, v.column_stride};
  return torch::stable::from_blob(v.data, sizes, strides, {torch::headeronly::DeviceType::CUDA, device}, type_of(v));
}

}  // namespace

std::shared_ptr<void> Host::allocate(int64_t bytes) const {
  std::array<int64_t, 1> sizes{bytes < 1 ? 1 : bytes};
  Tensor memory = torch::stable::empty(sizes, ScalarType::Byte, std::nullopt,
                                       torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
  return std::shared_ptr<void>(memory.data_ptr(), [memory](void*) {});
}

cudaStream_t Host::stream() const {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// `mm.dtype_out` returns float for bfloat16 operands; if all have one type, `mm.out`.
void Host::product(const View& a, const View& b, const View& out) const {
  using torch::stable::detail::from;
  Tensor left = tensor_of(a, device), right = tensor_of(b, device), into = tensor_of(out, device);
  if (a.bf16 == out.bf16) {
    std::array<StableIValue, 3> stack{from(left), from(right), from(into)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // the result, `into` again: takes over its reference
  } else {
    std::array<StableIValue, 4> stack{from(left), from(right), from(type_of(out)), from(into)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

}  // namespace sdpo::cuda
