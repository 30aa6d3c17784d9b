// CUDA's leaves: the columns of a chunk, and the launches and products of each step of the walk.
#include "leaves.h"

#include <algorithm>

namespace sdpo::cuda {

namespace {

// Chunk sizes depend on shapes only. Logits, and sums of a bfloat16 dW, go through a buffer that is small enough to
// stay in the second-level cache between the product that writes it and the kernel that reads it.
constexpr int64_t CACHED_ELEMENTS = int64_t(1) << 23;  // 32 MiB of float
constexpr int64_t LEAST_COLUMNS = 256;                 // of a product
constexpr int64_t CHUNK_ELEMENTS = int64_t(1) << 27;   // of S in one chunk: 256 MiB in bfloat16
constexpr int64_t CHUNK_SUMS = int64_t(1) << 23;       // partial sums of a chunk without S: 32 MiB

int64_t whole_blocks(int64_t columns) { return (columns + PANEL - 1) / PANEL * PANEL; }
int64_t slabs_of(int64_t columns) { return (columns + SLAB - 1) / SLAB; }

}  // namespace

template <class T>
T* Leaves::vector(Memory& memory) {
  memory = host.allocate(n_rows * int64_t(sizeof(T)));
  return static_cast<T*>(memory.get());
}

// Columns of the vocabulary with `height` numbers each.
int64_t Leaves::columns_at_once(int64_t height) const {
  int64_t columns = CACHED_ELEMENTS / std::max<int64_t>(height, 1) / PANEL * PANEL;
  return std::min(std::max(columns, LEAST_COLUMNS), whole_blocks(call.weight.rows));
}

int64_t Leaves::chunk_blocks(bool stored) const {
  int64_t rows = std::max<int64_t>(n_rows, 1);
  if (stored) return std::max<int64_t>(4, CHUNK_ELEMENTS / std::max(rows, width) / PANEL);
  int64_t parts = std::max<int64_t>(1, CHUNK_SUMS / rows);
  return std::max<int64_t>(4, parts * columns_at_once(n_rows) / PANEL);
}

// One product takes the whole stash, unless W has to be converted for it.
int64_t Leaves::stash_blocks(int64_t kept) const {
  return call.weight.bf16 == bf16 ? std::max<int64_t>(kept, 1) : chunk_blocks(true);
}

// --- both passes ---

void Leaves::begin(const Call& the_call) {
  call = the_call;
  n_rows = call.hidden.rows, width = call.hidden.columns;
  stream = host.stream();
  x = converted(call.hidden, x_copy);
}

// The rows in the operands' type: where they lie, or in `copy`.
Matrix Leaves::converted(const Matrix& rows, Memory& copy) {
  if (rows.bf16 == bf16) return rows;
  copy = host.allocate(rows.rows * rows.columns * element());
  convert_rows(rows, copy.get(), bf16, stream);
  return {copy.get(), rows.rows, rows.columns, rows.columns, bf16, false};
}

void Leaves::begin_forward(const Call& the_call) {
  begin(the_call);
  total = vector<double>(total_memory);
  shift = vector<float>(shift_memory);
  target_logits = call.target_logits;
  if (!call.is_slice()) {
    double* found = vector<double>(target_memory);
    cuda::target_logits(call, found, stream);
    target_logits = found;
  }
  begin_rows(target_logits, n_rows, shift, total, stream);
}

Blocks Leaves::part(const Blocks& s, int64_t first) const {
  Blocks from = s;
  if (s.data) from.data = static_cast<char*>(s.data) + first * PANEL * element();
  return from;
}

Blocks Leaves::scratch_blocks(int64_t count) {
  int64_t columns = std::min(count, call.blocks()) * PANEL;
  if (!scratch_s) scratch_s = host.allocate(n_rows * columns * element());
  return {scratch_s.get(), n_rows, nullptr, columns};
}

View Leaves::rows_of_weight(int64_t first, int64_t count) {
  const Matrix& w = call.weight;
  Matrix rows{
      static_cast<const char*>(w.data) + first * w.stride * (w.bf16 ? 2 : 4), count, width, w.stride, w.bf16, w.round};
  if (w.bf16 == bf16) return {const_cast<void*>(rows.data), count, width, w.stride, 1, bf16};
  if (weight_size < count * width) {
    weight_size = count * width;
    weight_copy = host.allocate(weight_size * element());
  }
  convert_rows(rows, weight_copy.get(), bf16, stream);
  return {weight_copy.get(), count, width, width, 1, bf16};
}

View Leaves::view_of(const Blocks& s, int64_t columns) const { return {s.data, n_rows, columns, s.stride, 1, bf16}; }

void Leaves::logits(int64_t first, int64_t count, const Blocks& out) {
  int64_t begin = first * PANEL, end = columns_until(first + count), at_once = columns_at_once(n_rows);
  int64_t most_slabs = (end - begin + at_once - 1) / at_once * slabs_of(at_once);
  bool summed = total != nullptr;

  if (!products) products = host.allocate(n_rows * at_once * int64_t(sizeof(float)));
  if (summed && sums_size < most_slabs * n_rows) {
    sums_size = most_slabs * n_rows;
    sums = host.allocate(sums_size * int64_t(sizeof(float)));
  }

  View operand{const_cast<void*>(x.data), n_rows, width, x.stride, 1, bf16};
  slabs = 0;
  for (int64_t column = begin; column < end; column += at_once) {
    int64_t columns = std::min(at_once, end - column), padded = whole_blocks(columns);
    host.product(operand, rows_of_weight(column, columns).transposed(),
                 {products.get(), n_rows, columns, padded, 1, false});

    Chunk chunk{static_cast<const float*>(products.get()),
                n_rows,
                padded,
                column,
                columns,
                call.bias,
                call.targets,
                shift,
                call.head,
                summed ? static_cast<float*>(sums.get()) + slabs * n_rows : nullptr,
                out.data ? part(out, (column - begin) / PANEL).data : nullptr,
                out.stride,
                bf16};
    exp_rows(chunk, stream);
    slabs += slabs_of(padded);
  }
}

void Leaves::add_hidden_gradient(int64_t first, int64_t count, const Blocks& s) {
  int64_t begin = first * PANEL, columns = columns_until(first + count) - begin;
  Memory& into = started ? hidden_part : hidden_sum;
  if (!into) into = host.allocate(n_rows * width * int64_t(sizeof(float)));
  host.product(view_of(s, columns), rows_of_weight(begin, columns), {into.get(), n_rows, width, width, 1, false});

  // mm.out overwrites its result: later chunks have a buffer of their own
  if (started)
    add(static_cast<float*>(hidden_sum.get()), static_cast<float*>(hidden_part.get()), n_rows * width, stream);
  started = true;
}

// --- forward ---

void Leaves::add_sums(int64_t) { cuda::add_sums(static_cast<float*>(sums.get()), slabs, n_rows, total, stream); }

void Leaves::finish_rows(float* logps, double* state) {
  cuda::finish_rows(call.is_slice(), total, target_logits, shift, n_rows, logps, state, stream);
}

void Leaves::redo_rows_out_of_range(const Kept& kept, float* logps, double* state) {
  void* stash = kept.blocks ? kept.stash.data : nullptr;
  float* sum = kept.direction ? static_cast<float*>(hidden_sum.get()) : nullptr;
  redo_rows({call, total, target_logits, logps, state, stash, kept.stash.stride, kept.blocks * PANEL, sum, bf16},
            stream);
}

void Leaves::finish_direction(const float* logps, const double* state, float* direction) {
  cuda::finish_direction(call, static_cast<float*>(hidden_sum.get()), logps, state, direction, stream);
}

// --- backward ---

void Leaves::begin_backward(const Call& the_call, bool stashed, const float* logps, const double* state,
                            const float* grad, const Gradients& wanted) {
  begin(the_call);
  r = vector<float>(r_memory);
  t = vector<float>(t_memory);
  shift = vector<float>(shift_memory);
  // a stash has been stored with the forward's k
  cuda::begin_backward(call, grad, logps, state, {r, shift, t, bf16 && !stashed}, stream);

  if (wanted.weight || wanted.bias) {
    by_target = vector<int64_t>(by_target_memory);
    sort_targets(call.targets, n_rows, by_target, stream);
  }
  if (!wanted.weight) return;
  bool is_all = wanted.weight_hidden.columns == width;
  weight_x = is_all ? x : converted(wanted.weight_hidden, weight_x_copy);
  scaled_x = host.allocate(n_rows * weight_x.columns * element());
  scale_rows(weight_x, r, scaled_x.get(), stream);
}

void Leaves::weight_gradient(int64_t first, int64_t count, const Blocks& s, void* out) {
  int64_t begin = first * PANEL, end = columns_until(first + count), across = weight_x.columns;
  View right{scaled_x.get(), n_rows, across, across, 1, bf16};
  if (!call.weight.bf16) {
    float* rows = static_cast<float*>(out) + begin * across;
    host.product(view_of(s, end - begin).transposed(), right, {rows, end - begin, across, across, 1, false});
    add_to_weight(sorted_targets(), weight_x, begin, end - begin, rows, stream);
    return;
  }

  // the targets' terms are added before the sums are rounded
  int64_t at_once = columns_at_once(across);
  if (!weight_sum) weight_sum = host.allocate(at_once * across * int64_t(sizeof(float)));
  for (int64_t column = begin; column < end; column += at_once) {
    int64_t columns = std::min(at_once, end - column);
    View sum{weight_sum.get(), columns, across, across, 1, false};
    host.product(view_of(part(s, (column - begin) / PANEL), columns).transposed(), right, sum);
    finish_weight(static_cast<float*>(sum.data), sorted_targets(), weight_x, column, columns,
                  static_cast<uint16_t*>(out) + column * across, stream);
  }
}

void Leaves::bias_gradient(int64_t first, int64_t count, const Blocks& s, float* out) {
  int64_t begin = first * PANEL;
  cuda::bias_gradient(s.data, s.stride, bf16, r, sorted_targets(), n_rows, begin, columns_until(first + count) - begin,
                      out + begin, stream);
}

void Leaves::finish_hidden_gradient(void* out) {
  finish_hidden(call, static_cast<float*>(hidden_sum.get()), r, t, out, stream);
}

}  // namespace sdpo::cuda
