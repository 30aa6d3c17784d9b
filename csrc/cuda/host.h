// What the walk asks of torch on CUDA: memory, the stream, matrix products. host.cpp answers through the stable ABI;
// the tests' emulator answers on the CPU.
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

  // From torch's allocator, aligned to 512 bytes; given back when the last copy goes, which the stream's order allows.
  std::shared_ptr<void> allocate(int64_t bytes) const;
  cudaStream_t stream() const;
  // out = a·b, summed in float and rounded once to out's type; a and b of one type.
  void product(const View& a, const View& b, const View& out) const;

 private:
  int device;
};

}  // namespace sdpo::cuda
