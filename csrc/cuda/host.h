// What the walk needs from torch on CUDA: memory, the stream, matrix products. host.cpp implements it with the stable
// ABI, the tests' emulator on the CPU.
#pragma once

#include <cstdint>
#include <memory>

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace sdpo::cuda {

// A strided matrix of bfloat16 or float on the device.
struct View {
  void* data;
  int64_t rows, columns, row_stride, column_stride;
  bool bf16;

  View transposed() const { return {data, columns, rows, column_stride, row_stride, bf16}; }
};

class Host {
 public:
  explicit Host(int device) : device(device) {}

  // From torch's allocator, aligned to 512 bytes; freed with the last copy, which is safe because work on the stream is
  // in order.
  std::shared_ptr<void> allocate(int64_t bytes) const;
  cudaStream_t stream() const;
  // out = a·b, summed in float and rounded once to out's type; a and b of one type.
  void product(const View& a, const View& b, const View& out) const;

 private:
  int device;
};

}  // namespace sdpo::cuda
