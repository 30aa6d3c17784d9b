#include "leaves.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "chunks.h"

namespace sdpo::cpu {

namespace {

int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

size_t bytes_of(const Matrix& m) { return m.bf16 ? 2 : 4; }

void store(const Matrix& like, void* out, int64_t at, float value) {
  if (like.bf16)
    static_cast<uint16_t*>(out)[at] = bf16_of_float(value);
  else
    static_cast<float*>(out)[at] = value;
}

}  // namespace

// --- both passes ---

int64_t Leaves::chunk_blocks(bool stored) const {
  if (!lists.given()) return blocks_of_chunk(n_rows, stored);

  // as many as hold a chunk's rows on average, and fewer if the fullest chunk would hold more
  int64_t blocks = std::max<int64_t>(call.blocks(), 1);
  int64_t count = std::min(blocks, blocks_of_chunk(lists.rows_of(0, call.blocks()) / blocks, stored));
  while (count > blocks_of_chunk(n_rows, stored) && lists.most_rows(count) * PANEL > CHUNK_ELEMENTS)
    count = std::max(count / 2, blocks_of_chunk(n_rows, stored));
  return count;
}

int64_t Leaves::stash_blocks(int64_t kept) const { return std::max<int64_t>(kept, 1); }

void Leaves::begin_forward(const Call& the_call) {
  call = the_call;
  n_rows = call.hidden.rows;
  x_units = on.units(call.hidden.columns);
  x = load_rows(call.hidden, x_copy);
  shift = make_buffer<float>(n_rows);
  total = make_buffer<double>(n_rows);
  std::memset(total.get(), 0, n_rows * sizeof(double));

  target_logits = call.target_logits;
  if (!call.is_slice()) {
    own_target_logits = make_buffer<double>(n_rows);
    cpu::target_logits(call, own_target_logits.get());
    target_logits = own_target_logits.get();
  }
  for (int64_t i = 0; i < n_rows; i++) shift[i] = float(std::isfinite(target_logits[i]) ? target_logits[i] : 0.0);

  if (!row_extras) return;
  target_z = make_buffer<float>(n_rows);
  std::memset(target_z.get(), 0, n_rows * sizeof(float));  // the product of a target in another slice is not here
  std::fill_n(row_extras, n_rows, RowExtras{});
}

// Rows of units: where they lie, if they are such rows, or in `copy`.
const Unit* Leaves::load_rows(const Matrix& from, Buffer<Unit>& copy) const {
  int64_t units = on.units(from.columns);
  bool as_it_lies = from.bf16 == on.bf16 && !from.round && from.stride == from.columns &&
                    units * 4 == from.columns * int64_t(bytes_of(from));
  if (as_it_lies) return static_cast<const Unit*>(from.data);

  copy = make_buffer<Unit>(n_rows * units);
  parallel_rows(n_rows, 16, [&](int64_t begin, int64_t end) { on.load_rows(from, begin, end, copy.get()); });
  return copy.get();
}

// From operands rounded like those of the products.
void target_logits(const Call& call, double* out) {
  parallel_rows(call.hidden.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      int64_t y = call.targets[i];
      if (y < 0) {
        out[i] = 0.0;
        continue;
      }
      double a[4] = {};
      for (int64_t h = 0; h < call.hidden.columns; h++)
        a[h % 4] += double(call.hidden.number(i, h)) * double(call.weight.number(y, h));

      double sum = (a[0] + a[1]) + (a[2] + a[3]) + (call.bias ? call.bias[y] : 0.0f), slope;
      out[i] = logit_double(call.head, call.softcap, call.temperature, sum, &slope);
    }
  });
}

Blocks Leaves::part(const Blocks& s, int64_t first) const {
  Blocks from = s;
  if (s.data) from.data = static_cast<char*>(s.data) + first * s.rows * PANEL * (on.bf16 ? 2 : 4);
  return from;
}

Blocks Leaves::scratch_blocks(int64_t count) {
  count = std::min(count, call.blocks());
  int64_t rows = lists.given() ? lists.most_rows(count) : count * n_rows;
  if (!scratch_s) scratch_s = make_buffer<char>(rows * PANEL * (on.bf16 ? 2 : 4));
  return {scratch_s.get(), n_rows, nullptr};
}

void Leaves::logits(int64_t first, int64_t count, const Blocks& out) {
  bool summed = total != nullptr;
  sums_from = keeps_sums ? first * n_rows : 0;
  int64_t needed = (keeps_sums ? call.blocks() : count) * n_rows;
  if (summed && sums_size < needed) {
    sums_size = needed;
    sums = make_buffer<float>(sums_size);
    if (row_extras) block_extras = make_buffer<BlockExtras>(sums_size);
  }

  run_logits({x, n_rows, x_units, call.weight, call.bias, call.targets, shift.get(), call.head, first,
              summed ? sums.get() + sums_from : nullptr, nullptr, out, block_extras.get(), target_z.get(),
              lists_of(first, out)},
             count);
}

void Leaves::run_logits(Logits task, int64_t count) {
  int64_t parts = row_parts(count, task.n_rows);
  int64_t scratch = on.logits_scratch(task, (task.n_rows + parts - 1) / parts + TILE_ROWS);
  parallel_tasks(count * parts, scratch, [&](int64_t number, void* memory) {
    int64_t block = number / parts, part = number % parts, rows = task.lists.count(block, task.n_rows);
    on.logits(task, block, row_border(part, parts, rows), row_border(part + 1, parts, rows), memory);
  });
}

// S in scratch memory has the listed rows only, a stash has all.
Lists Leaves::lists_of(int64_t first, const Blocks& s) const {
  return lists.given() ? lists.from(first, s.data == scratch_s.get()) : Lists{};
}

double Leaves::target_slope(double target_logit) const {
  return slope_at(call.head, call.softcap, call.temperature, target_logit);
}

void Leaves::start_hidden_gradient() {
  sum_stride = panels_of(call.hidden.columns) * PANEL;
  hidden_sum = make_buffer<float>(n_rows * sum_stride);
  std::memset(hidden_sum.get(), 0, n_rows * sum_stride * sizeof(float));
}

void Leaves::add_hidden_gradient(int64_t first, int64_t count, const Blocks& s) {
  if (!hidden_sum) start_hidden_gradient();
  if (n_rows == 0 || sum_stride == 0) return;

  // every panel of 64 columns of H reads S again: few enough blocks at a time that S stays in cache
  if (lists.given()) return add_listed_hidden_gradient(first, count, s);
  int64_t panels = sum_stride / PANEL, parts = row_parts(panels, n_rows);
  int64_t cached = CACHED_BYTES / (PANEL * n_rows * (on.bf16 ? 2 : 4));
  int64_t step = std::max(BLOCKS_AT_ONCE, cached / BLOCKS_AT_ONCE * BLOCKS_AT_ONCE);
  for_chunks(count, 0, 1, step, [&](int64_t begin, int64_t blocks) {
    HiddenGradient task{part(s, begin), call.weight, first + begin, blocks, n_rows, hidden_sum.get(), sum_stride, {}};
    parallel_tasks(panels * parts, on.hidden_gradient_scratch(), [&](int64_t number, void* memory) {
      int64_t panel = number / parts, part = number % parts;
      on.hidden_gradient(task, panel, row_border(part, parts, n_rows), row_border(part + 1, parts, n_rows), memory);
    });
  });
}

void Leaves::add_listed_hidden_gradient(int64_t first, int64_t count, const Blocks& s) {
  int64_t panels = sum_stride / PANEL, parts = row_parts(panels, n_rows);
  for (int64_t begin = 0, end; begin < count; begin = end) {
    // as many blocks as keep their S in cache, but one at least
    for (end = begin + 1; end < count; end++)
      if (lists.rows_of(first + begin, first + end + 1) * PANEL * (on.bf16 ? 2 : 4) > CACHED_BYTES) break;

    Lists some = lists_of(first, s);
    Blocks from = part(s, begin);
    if (some.is_all_of_s)
      from.data = static_cast<char*>(s.data) + lists.rows_of(first, first + begin) * PANEL * (on.bf16 ? 2 : 4);
    some.first += begin;
    HiddenGradient task{from, call.weight, first + begin, end - begin, n_rows, hidden_sum.get(), sum_stride, some};
    parallel_tasks(panels * parts, on.hidden_gradient_scratch(), [&](int64_t number, void* memory) {
      int64_t panel = number / parts, part = number % parts;
      on.hidden_gradient_listed(task, panel, row_border(part, parts, n_rows), row_border(part + 1, parts, n_rows),
                                memory);
    });
  }
}

// --- forward ---

void Leaves::add_sums(int64_t count) {
  parallel_rows(n_rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t block = 0; block < count; block++)
      for (int64_t i = begin; i < end; i++) {
        total[i] += sums[sums_from + block * n_rows + i];
        if (row_extras) add(row_extras[i], block_extras[block * n_rows + i]);
      }
  });
}

void Leaves::finish_rows(float* logps, double* state) {
  for (int64_t i = 0; i < n_rows; i++) {
    if (row_extras) row_extras[i].target_z = target_z[i];
    state[2 * i] = total[i];
    state[2 * i + 1] = shift[i];
    if (call.is_slice()) continue;

    RowResult row = row_result(target_logits[i], rest_of_sum(total[i], shift[i]));
    logps[i] = float(row.logp);
    state[2 * i] = row.lse;
  }
}

void Leaves::choose_tiles(double tolerance, bool relative, const double* state, const Tiles& to) const {
  auto whole = make_buffer<double>(n_rows);
  for (int64_t i = 0; i < n_rows; i++) {
    whole[i] = relative ? total[i] : std::exp(state[2 * i] - shift[i] - SHIFT);
    if (out_of_range(total[i], target_logits[i])) whole[i] = 0.0;
  }
  cpu::choose_tiles({sums.get(), call.blocks(), n_rows, call.targets, whole.get()}, tolerance, to);
}

void Leaves::finish_direction(const float* logps, const double* state, float* direction) {
  int64_t width = call.hidden.columns;
  parallel_rows(n_rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      double lse = state[2 * i], slope = target_slope(lse + logps[i]);
      DirectionFactors by = direction_factors(call.head.gain, logps[i], lse, state[2 * i + 1], slope);
      for (int64_t h = 0; h < width; h++) {
        float w = call.weight.number(call.targets[i], h);
        direction[i * width + h] = by.of_sum * hidden_sum[i * sum_stride + h] + by.of_target * w;
      }
    }
  });
}

// --- backward ---

void Leaves::begin_backward(const Call& the_call, bool stashed, const float* logps, const double* state,
                            const float* grad, const Gradients& wanted) {
  call = the_call;
  n_rows = call.hidden.rows;
  x_units = on.units(call.hidden.columns);
  x = load_rows(call.hidden, x_copy);
  shift = make_buffer<float>(n_rows);
  r = make_buffer<float>(n_rows);
  t = make_buffer<float>(n_rows);
  for (int64_t i = 0; i < n_rows; i++) {
    double lse = state[2 * i], k = state[2 * i + 1];
    RowFactor factor{float(k), gradient_factor(grad[i], call.head.gain, k, lse)};
    if (on.bf16 && !stashed) factor = exact_factor(k, factor.r);  // a stash has been stored with this very k
    shift[i] = factor.shift;
    r[i] = factor.r;
    double slope = target_slope(lse + logps[i]);
    t[i] = call.targets[i] < 0 ? 0.0f : target_factor(grad[i], call.head.gain, logps[i], slope);
  }

  if (tiles.bits) lists = RowLists(tiles, n_rows, call.blocks());
  if (wanted.hidden) start_hidden_gradient();
  if (wanted.weight || wanted.bias) sort_targets();
  if (!wanted.weight) return;

  weight_hidden = wanted.weight_hidden;
  bool is_all = weight_hidden.columns == call.hidden.columns;
  weight_x = is_all ? x : load_rows(weight_hidden, weight_x_copy);
  if (lists.given()) return;
  int64_t width = weight_hidden.columns, panels = panels_of(width), panel_units = on.units(n_rows) * PANEL;
  scaled_x = make_buffer<Unit>(panels * panel_units);
  parallel_tasks(panels, 0, [&](int64_t panel, void*) {
    on.scale_rows(weight_x, n_rows, nullptr, on.units(width), width, r.get(), panel,
                  scaled_x.get() + panel * panel_units);
  });
}

void Leaves::sort_targets() {
  by_target.resize(n_rows);
  std::iota(by_target.begin(), by_target.end(), 0);
  std::stable_sort(by_target.begin(), by_target.end(),
                   [&](int64_t a, int64_t b) { return call.targets[a] < call.targets[b]; });
}

Targets Leaves::sorted_targets() const { return {by_target.data(), n_rows, call.targets, t.get()}; }

void Leaves::weight_gradient(int64_t first, int64_t count, const Blocks& s, void* out) {
  WeightGradient task{s,
                      n_rows,
                      first,
                      scaled_x.get(),
                      r.get(),
                      lists_of(first, s),
                      weight_x,
                      on.units(weight_hidden.columns),
                      sorted_targets(),
                      out,
                      call.weight.rows,
                      weight_hidden.columns,
                      call.weight.bf16};
  parallel_tasks(count, on.weight_gradient_scratch(task),
                 [&](int64_t block, void* memory) { on.weight_gradient(task, block, memory); });
}

void Leaves::bias_gradient(int64_t first, int64_t count, const Blocks& s, float* out) {
  Targets targets = sorted_targets();
  parallel_tasks(count, 0, [&](int64_t block, void*) {
    double columns[PANEL];
    on.bias_gradient(s, lists_of(first, s), n_rows, block, r.get(), columns);
    int64_t start = (first + block) * PANEL, end = std::min(start + PANEL, call.weight.rows);
    for (int64_t at = targets.first_from(start); targets.is_before(at, end); at++)
      columns[targets.column(at) - start] += t[targets.rows[at]];
    for (int64_t j = start; j < end; j++) out[j] = float(columns[j - start]);
  });
}

void Leaves::finish_hidden_gradient(void* out) {
  int64_t width = call.hidden.columns;
  parallel_rows(n_rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      for (int64_t h = 0; h < width; h++) {
        float of_target = call.targets[i] < 0 ? 0.0f : t[i] * call.weight.number(call.targets[i], h);
        store(call.hidden, out, i * width + h, r[i] * hidden_sum[i * sum_stride + h] + of_target);
      }
  });
}

}  // namespace sdpo::cpu
