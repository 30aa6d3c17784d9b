// One walk over the vocabulary, forward and backward: host code that calls small leaves, so that each device brings its
// own leaves (cpu/leaves.h, cuda/leaves.h). All rows take part in every chunk; chunks depend on shapes only.
//
// Forward:
//     1. k of each row: its target's logit
//     2. chunk by chunk: logits, E = 2⁻⁵⁸·exp(z − k) = 2**-58 * exp(z - k), its row sums o, and S where it is kept;
//        for a frozen head also Σ S·W
//     3. log-probs and logsumexp of the rows from their sums
//     4. rows out of range once more, with k = logsumexp
//     5. for a frozen head d logp / d hidden
//
// A slice of the vocabulary (the other columns are other calls' or other devices'): z_y is given, targets in other
// slices are −1, and the state is (o, k) of the slice's own columns. Rows out of range have the log-sum of these
// columns as their k. The backward takes the log-prob and logsumexp over all slices, and the slice's k.
//
// Backward: S_ij = E_ij·c_ij with c = dz/da up to `gain`, 0 at the target y. With r = −g·gain/(o + 2⁻⁵⁸·e^(z_y − k))
// and t = g·gain·(1 − p)·c_y, chunk by chunk, from the stash or from recomputed logits:
//
//     dX = r ⊙ (S·W) + t ⊙ W[y]      dW = Sᵀ·(r ⊙ X) + Yᵀ·(t ⊙ X)      db = Sᵀ·r + Yᵀ·t      Y: the targets, one-hot
//
// Y's terms are N×H work. They are added in float, before a gradient is rounded: S and r ⊙ X may be bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>

#include "call.h"

namespace sdpo {

// Calls f(first, count) for chunks of blocks, each block once; a chunk ends at `border`.
template <class F>
void for_chunks(int64_t blocks, int64_t border, int64_t step_before, int64_t step_after, const F& f) {
  for (int64_t first = 0; first < border; first += step_before) f(first, std::min(step_before, border - first));
  for (int64_t first = border; first < blocks; first += step_after) f(first, std::min(step_after, blocks - first));
}

// Writes logps [N] (not of a slice), state [N][2] (logsumexp and k of each row; of a slice o and k), and what `kept`
// asks for.
template <class Leaves>
void forward(Leaves& leaves, const Call& call, const Kept& kept, float* logps, double* state) {
  leaves.begin_forward(call);
  int64_t without = leaves.chunk_blocks(false), with = leaves.chunk_blocks(true);
  bool direct = kept.direction != nullptr;

  for_chunks(call.blocks(), kept.blocks, without, direct ? with : without, [&](int64_t first, int64_t count) {
    Blocks s = first < kept.blocks ? leaves.part(kept.stash, first) : direct ? leaves.scratch_blocks(with) : Blocks{};
    leaves.logits(first, count, s);
    leaves.add_sums(count);
    if (direct) leaves.add_hidden_gradient(first, count, s);
  });

  leaves.finish_rows(logps, state);
  leaves.redo_rows_out_of_range(kept, logps, state);
  if (direct) leaves.finish_direction(logps, state, kept.direction);
}

template <class Leaves>
void backward(Leaves& leaves, const Call& call, const Kept& kept, const float* logps, const double* state,
              const float* grad, const Gradients& wanted) {
  leaves.begin_backward(call, kept.blocks > 0, logps, state, grad, wanted);

  int64_t with = leaves.chunk_blocks(true), at_once = leaves.stash_blocks(kept.blocks);
  for_chunks(call.blocks(), kept.blocks, at_once, with, [&](int64_t first, int64_t count) {
    Blocks s = leaves.part(kept.stash, first);
    if (first >= kept.blocks) {
      s = leaves.scratch_blocks(with);
      leaves.logits(first, count, s);
    }

    if (wanted.hidden) leaves.add_hidden_gradient(first, count, s);
    if (wanted.weight) leaves.weight_gradient(first, count, s, wanted.weight);
    if (wanted.bias) leaves.bias_gradient(first, count, s, wanted.bias);
  });

  if (wanted.hidden) leaves.finish_hidden_gradient(wanted.hidden);
}

}  // namespace sdpo
