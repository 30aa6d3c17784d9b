// Work for torch's own thread pool, and memory for a call.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace sdpo::cpu {

constexpr size_t ALIGNMENT = 64;  // a cache line, and a vector register of AVX-512

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Uninitialised, aligned memory for `count` values.
template <class T>
Buffer<T> make_buffer(int64_t count) {
  size_t bytes = (size_t(count < 1 ? 1 : count) * sizeof(T) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  void* memory = std::aligned_alloc(ALIGNMENT, bytes);
  if (!memory) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

// A thread's own working memory, kept from task to task.
inline void* thread_scratch(int64_t bytes) {
  thread_local Buffer<char> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    size = 0;  // if there is no memory, the next task must not use the old one
    memory.reset();
    memory = make_buffer<char>(bytes);
    size = bytes;
  }
  return memory.get();
}

// f(task, scratch) once for every task. The next free thread takes the next task, so a slow thread does not delay the
// others; results must not depend on which thread it is.
template <class F>
void parallel_tasks(int64_t tasks, int64_t scratch_bytes, const F& f) {
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t, int64_t) {
    void* scratch = thread_scratch(scratch_bytes);
    for (int64_t task = next++; task < tasks; task = next++) f(task, scratch);
  };
  int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (workers <= 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, workers, 1, work);
}

// f(begin, end) over ranges of rows.
template <class F>
void parallel_rows(int64_t rows, int64_t at_least, const F& f) {
  int64_t parts = std::min<int64_t>(4 * int64_t(torch::stable::get_num_threads()), (rows + at_least - 1) / at_least);
  parallel_tasks(parts, 0, [&](int64_t part, void*) { f(rows * part / parts, rows * (part + 1) / parts); });
}

}  // namespace sdpo::cpu
