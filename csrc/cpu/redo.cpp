// Rows whose sum is out of float's range, once more.
#include <cmath>
#include <cstring>

#include "chunks.h"
#include "leaves.h"

namespace sdpo::cpu {

// log Σ exp of all columns but the target, with a running maximum, for a few rows.
void Leaves::log_sums_online(const std::vector<int64_t>& rows, const Unit* few, const int64_t* targets, double* rest) {
  int64_t count = int64_t(rows.size()), step = blocks_of_chunk(count, false);
  auto parts = make_buffer<float>(std::min(step, call.blocks()) * count),
       maxima = make_buffer<float>(std::min(step, call.blocks()) * count);
  std::vector<double> top(count, -INFINITY), sum(count, 0.0);
  for_chunks(call.blocks(), 0, step, step, [&](int64_t first, int64_t blocks) {
    run_logits({few,
                count,
                x_units,
                call.weight,
                call.bias,
                targets,
                nullptr,
                call.head,
                first,
                parts.get(),
                maxima.get(),
                {}},
               blocks);

    for (int64_t at = 0; at < blocks * count; at++) {
      int64_t i = at % count;
      if (maxima[at] == -INFINITY) continue;
      if (!(maxima[at] <= top[i])) {  // a NaN is kept: sum and top are NaN from then on
        sum[i] = sum[i] * std::exp(top[i] - maxima[at]) + parts[at];
        top[i] = maxima[at];
      } else {
        sum[i] += parts[at] * std::exp(maxima[at] - top[i]);
      }
    }
  });
  for (int64_t i = 0; i < count; i++) rest[i] = top[i] + std::log(sum[i]);
}

// Recomputes rows whose sum is out of float's range (an unlikely target, or one of probability 0):
//     1. gather them
//     2. their logsumexp, with a running maximum: log-prob, and k
//     3. their rows of the stash
//     4. for a frozen head, their Σ S·W
void Leaves::redo_rows_out_of_range(const Kept& kept, float* logps, double* state) {
  std::vector<int64_t> rows, targets;
  for (int64_t i = 0; i < n_rows; i++)
    if (out_of_range(total[i], target_logits[i])) {
      rows.push_back(i);
      targets.push_back(call.targets[i]);
    }
  if (rows.empty()) return;

  Leaves few(on);
  few.call = call;
  few.n_rows = few.call.hidden.rows = int64_t(rows.size());
  few.call.targets = targets.data();
  few.x_units = x_units;
  few.x_copy = make_buffer<Unit>(few.n_rows * x_units);
  few.x = few.x_copy.get();
  few.shift = make_buffer<float>(few.n_rows);
  for (int64_t i = 0; i < few.n_rows; i++)
    std::memcpy(few.x_copy.get() + i * x_units, x + rows[i] * x_units, x_units * sizeof(Unit));

  std::vector<double> rest(rows.size());
  log_sums_online(rows, few.x, few.call.targets, rest.data());
  for (int64_t i = 0; i < few.n_rows; i++) {
    int64_t row = rows[i];
    if (call.is_slice()) {
      SliceRow own = slice_row(rest[i]);
      state[2 * row] = own.sum;
      few.shift[i] = own.shift;
    } else {
      RowResult result = row_result(target_logits[row], rest[i]);
      logps[row] = float(result.logp);
      state[2 * row] = result.lse;
      few.shift[i] = float(result.lse);
    }
    state[2 * row + 1] = few.shift[i];
  }

  for_chunks(kept.blocks, 0, 1, blocks_of_chunk(few.n_rows, false), [&](int64_t first, int64_t count) {
    Blocks s = part(kept.stash, first);
    s.row_of = rows.data();
    few.logits(first, count, s);
  });

  if (!kept.direction) return;
  int64_t step = blocks_of_chunk(few.n_rows, true);
  for_chunks(call.blocks(), 0, 1, step, [&](int64_t first, int64_t count) {
    Blocks s = few.scratch_blocks(step);
    few.logits(first, count, s);
    few.add_hidden_gradient(first, count, s);
  });
  for (int64_t i = 0; i < few.n_rows; i++)
    std::memcpy(hidden_sum.get() + rows[i] * sum_stride, few.hidden_sum.get() + i * sum_stride,
                sum_stride * sizeof(float));
}

}  // namespace sdpo::cpu
