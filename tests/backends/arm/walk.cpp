// `make arm`: the walk, the CPU's leaves and the base kernels, forward and backward, against loops in double.
//
// A program without torch, so that it can be compiled for another processor and run in qemu. Of torch the leaves use
// two functions, for threads; here they are replaced by one thread.
#include "../../../csrc/walk.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../../csrc/cpu/chip.h"
#include "../../../csrc/cpu/leaves.h"

extern "C" AOTITorchError torch_get_num_threads(uint32_t* out) {
  *out = 1;
  return 0;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f, void* context) {
  f(begin, end, context);
  return 0;
}

namespace {

using namespace sdpo;

float uniform() { return 2.0f * float(std::rand()) / float(RAND_MAX) - 1.0f; }

void check(const char* what, double found, double right, double largest) {
  if (std::fabs(found - right) <= 2e-6 * largest) return;
  std::printf("%s: was %.9g, must be %.9g\n", what, found, right);
  std::exit(1);
}

// Log-probs and gradients of one shape; with the whole stash or none.
void one_shape(int64_t n_rows, int64_t width, int64_t n_columns, double softcap, bool stashed) {
  std::vector<float> x(n_rows * width), w(n_columns * width), grad(n_rows), logps(n_rows);
  std::vector<int64_t> targets(n_rows);
  for (float& value : x) value = uniform();
  for (float& value : w) value = uniform() * 3.0f / std::sqrt(float(width));  // logits of a few units
  for (int64_t i = 0; i < n_rows; i++) targets[i] = std::rand() % n_columns, grad[i] = uniform();

  Call call{{x.data(), n_rows, width, width, false, false},
            {w.data(), n_columns, width, width, false, false},
            nullptr,
            targets.data(),
            make_head(1.5, softcap, 0.8),
            softcap,
            0.8};
  std::vector<float> stash(call.blocks() * n_rows * PANEL), dx(x.size()), dw(w.size());
  std::vector<double> state(2 * n_rows);
  Kept kept{stashed ? call.blocks() : 0, {stash.data(), n_rows, nullptr}, nullptr};
  cpu::Leaves on_forward(cpu::kernels_for(false)), on_backward(cpu::kernels_for(false));
  forward(on_forward, call, kept, logps.data(), state.data());
  Gradients gradients{dx.data(), dw.data(), nullptr, call.hidden};
  backward(on_backward, call, kept, logps.data(), state.data(), grad.data(), gradients);

  std::vector<double> right_dx(x.size()), right_dw(w.size()), z(n_columns), slope(n_columns);
  for (int64_t i = 0; i < n_rows; i++) {
    double all = 0.0;
    for (int64_t j = 0; j < n_columns; j++) {
      double a = 0.0;
      for (int64_t k = 0; k < width; k++) a += double(x[i * width + k]) * w[j * width + k];
      double tanh_a = softcap > 0 ? std::tanh(1.5 * a / softcap) : 0.0;
      z[j] = (softcap > 0 ? softcap * tanh_a : 1.5 * a) / 0.8;
      slope[j] = (1.0 - tanh_a * tanh_a) * 1.5 / 0.8;
      all += std::exp(z[j]);
    }
    check("logp", logps[i], z[targets[i]] - std::log(all), std::log(all) - z[targets[i]]);
    for (int64_t j = 0; j < n_columns; j++) {
      double g = grad[i] * slope[j] * ((j == targets[i]) - std::exp(z[j]) / all);
      for (int64_t k = 0; k < width; k++) {
        right_dx[i * width + k] += g * w[j * width + k];
        right_dw[j * width + k] += g * x[i * width + k];
      }
    }
  }
  for (size_t at = 0; at < dx.size(); at++) check("d hidden", dx[at], right_dx[at], 1.0);
  for (size_t at = 0; at < dw.size(); at++) check("d weight", dw[at], right_dw[at], 1.0);
}

}  // namespace

int main() {
  if (sdpo::cpu::chip() != "base") return std::printf("chip: was %s, must be base\n", sdpo::cpu::chip().c_str()), 1;
  for (bool stashed : {true, false}) {
    one_shape(7, 65, 137, 0.0, stashed);
    one_shape(64, 16, 300, 5.0, stashed);
    one_shape(1, 1, 65, 0.0, stashed);
    one_shape(13, 1100, 20, 0.0, stashed);
  }
  std::puts("base kernels: log-probs and gradients agree with double");
}
