// csrc/cuda/host.h implemented on the CPU: memory filled with NaN, products by three loops.
#include "../../../csrc/cuda/host.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "../../../csrc/row_math.h"

namespace sdpo::cuda {

namespace {

double at(const View& v, int64_t row, int64_t column) {
  int64_t place = row * v.row_stride + column * v.column_stride;
  return v.bf16 ? float_of_bf16(static_cast<const uint16_t*>(v.data)[place]) : static_cast<const float*>(v.data)[place];
}

}  // namespace

std::shared_ptr<void> Host::allocate(int64_t bytes) const {
  size_t size = (size_t(bytes < 1 ? 1 : bytes) + 511) / 512 * 512;
  void* memory = std::aligned_alloc(512, size);
  std::memset(memory, 0xff, size);  // reading memory that was not written must show
  return std::shared_ptr<void>(memory, std::free);
}

cudaStream_t Host::stream() const { return nullptr; }

void Host::product(const View& a, const View& b, const View& out) const {
  if (a.bf16 != b.bf16 || (!a.bf16 && out.bf16)) throw std::runtime_error("torch has no such product");
  for (int64_t i = 0; i < a.rows; i++)
    for (int64_t j = 0; j < b.columns; j++) {
      double sum = 0.0;
      for (int64_t k = 0; k < a.columns; k++) sum += at(a, i, k) * at(b, k, j);
      int64_t place = i * out.row_stride + j * out.column_stride;
      if (out.bf16)
        static_cast<uint16_t*>(out.data)[place] = bf16_of_float(float(sum));
      else
        static_cast<float*>(out.data)[place] = float(sum);
    }
}

}  // namespace sdpo::cuda
