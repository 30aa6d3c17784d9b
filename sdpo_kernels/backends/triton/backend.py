"""The Triton backend: exp-direct tiles, one walk over the vocabulary, dX and dW by torch's own GEMMs.

Forward:
    1. each row's target logit: k
    2. walk over the vocabulary: tiles of logits, their row sums of E = 2**-58 · exp(z − k) (2⁻⁵⁸), and S = E · dz/da,
       which goes to the stash or, for a frozen head, into Σ S·W
    3. finalize: log-probs, logsumexp and extras from the tiles' sums
    4. redo: rows out of range, with k = their logsumexp
    5. finish the direction of a frozen head

Backward:
    1. frozen head: one product with what the forward kept, and no walk
    2. else walk: S from the stash or recomputed, then dX = r ⊙ (S·W), dW = Sᵀ·(r ⊙ X), db = r·S, in float32
    3. add the targets' own terms (targets.py) and round once
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sdpo_kernels.backends import precision
from sdpo_kernels.backends.base import (
    EXTRAS,
    Gradients,
    HeadCall,
    HeadForward,
    Keep,
    Needs,
    Saved,
    SliceForward,
)
from sdpo_kernels.backends.eager import EagerBackend
from sdpo_kernels.backends.triton import launch
from sdpo_kernels.backends.triton.chosen import choose
from sdpo_kernels.backends.triton.gradients import factors_of, finish
from sdpo_kernels.backends.triton.launch import Rows, Sums
from sdpo_kernels.backends.triton.targets import SortedRows

CHUNK_ELEMENTS = 2**28  # of S in one chunk: 512 MiB in bfloat16
PART_ELEMENTS = 2**24  # of the extras' partial sums: 64 MiB
SLAB_ELEMENTS = 2**23  # of dW in float32 before it is rounded: 32 MiB stay in the second-level cache


def chunks(call: HeadCall, border: int, before: int, after: int) -> Iterator[tuple[int, int]]:
    """(start, stop) over the vocabulary in steps of `before` up to `border` and `after` from there."""
    n_columns = call.weight.shape[0]
    for first, last, columns in ((0, border, before), (border, n_columns, after)):
        for start in range(first, last, columns):
            yield start, min(start + columns, last)


def chunk_columns(call: HeadCall, tile_columns: int) -> int:
    """Columns per chunk, so that S and a cast copy of the rows of W fit CHUNK_ELEMENTS."""
    columns = CHUNK_ELEMENTS // max(1, call.hidden.shape[0], call.hidden.shape[1])
    everything = -(-call.weight.shape[0] // tile_columns)
    return min(max(1, columns // tile_columns), everything) * tile_columns


def _forward_columns(rows: Rows, direction: Tensor | None) -> int:
    """Columns per launch of a forward: all, unless W is cast, S is in scratch memory or the extras' sums are many."""
    call, tile = rows.call, rows.columns
    if call.weight.dtype == call.dtype and direction is None:
        columns = -(-call.weight.shape[0] // tile) * tile
    else:
        columns = chunk_columns(call, tile)
    if not call.outputs:
        return columns
    return min(columns, max(1, PART_ELEMENTS // (4 * max(1, rows.x.shape[0]))) * tile)


def forward(call: HeadCall, keep: Keep) -> HeadForward:
    """See `base.Backend.forward`."""
    rows = Rows.of(call, forward=True)
    if keep.grad_tol > 0:  # QuACK's kernel has no sums of 64 columns
        rows = replace(rows, persistent=False)
    n_rows = call.hidden.shape[0]
    kept = _buffer_to_keep(rows, keep)
    direction = None if kept is None or not keep.is_direction else kept[:n_rows]
    stash = None if kept is None or keep.is_direction else kept[:n_rows]
    sums, found = _sums(rows, stash, direction, keep.grad_tol > 0)
    tiles = choose(rows, sums, found, keep) if keep.grad_tol > 0 else None
    if direction is not None:
        _finish_direction(call, found.logps[:n_rows], found.state[:n_rows], direction, keep)

    # the reference's rows come after the policy's: only their log-probs are returned
    extras = {
        "entropy": found.entropy,
        "log_sum_sq_probs": found.log_sum_sq,
        "mean_logits": found.mean_logits,
        "is_top1": sums.is_top1(),
    }

    def own(value: Tensor | None, name: str) -> Tensor | None:
        return None if value is None or name not in call.outputs else value[:n_rows]

    return HeadForward(
        logps=found.logps[:n_rows],
        state=found.state[:n_rows],
        **{name: own(extras[name], name) for name in EXTRAS},
        kept=kept,
        ref_logps=None if call.ref_hidden is None else found.logps[n_rows:].clone(),
        tiles=tiles,
    )


def _sums(
    rows: Rows, stash: Tensor | None, direction: Tensor | None, by_tile: bool = False
) -> tuple[Sums, launch.Finished]:
    """The walk and what follows from its sums; rows out of range are recomputed before anything reads them."""
    n_columns, tile = rows.call.weight.shape[0], rows.columns
    sums = Sums.of(rows, -(-n_columns // tile), _forward_columns(rows, direction) // tile, by_tile)
    with precision.full(rows.x.device):
        _walk(rows, sums, stash, direction)

    found = launch.finalize(rows, sums)
    launch.redo(rows, found, stash, direction)
    return sums, found


def target_logits(call: HeadCall) -> Tensor:
    """See `base.Backend.target_logits`."""
    return Rows.of(call, forward=True).target_logits.double()


def slice_forward(call: HeadCall, target_logits: Tensor, keep: Keep) -> SliceForward:
    """See `base.Backend.slice_forward`."""
    rows = Rows.of(call, forward=True, target_logits=target_logits)
    stash = _buffer_to_keep(rows, keep)
    sums, found = _sums(rows, stash, None)
    total, k = found.state.unbind(1)
    if sums.folded is None or sums.gemm_target is None:
        return SliceForward(total, k, stash)
    return SliceForward(
        total, k, stash, mean_log_prob=found.entropy, sum_sq_probs=found.log_sum_sq, sum_logits=found.mean_logits,
        max_rest=sums.folded[3], target_z=sums.gemm_target.double(),
    )  # fmt: skip


def _buffer_to_keep(rows: Rows, keep: Keep) -> Tensor | None:
    """What the forward returns for the backward; rows past N and columns past V are padding and set to 0."""
    call = rows.call
    n_rows, width = call.hidden.shape
    if keep.is_direction:
        return rows.x.new_zeros((call.kept_rows, width), dtype=torch.float32)
    if keep.n_columns == 0:
        return None
    kept = rows.x.new_empty((call.kept_rows, keep.n_columns))
    kept[n_rows:].zero_()
    kept[:, call.weight.shape[0] :].zero_()
    return kept


def _walk(rows: Rows, sums: Sums, stash: Tensor | None, direction: Tensor | None) -> None:
    """All tiles of the vocabulary; S goes to the stash, or through scratch memory into `direction`, or nowhere."""
    call, n_rows = rows.call, rows.call.hidden.shape[0]
    step = _forward_columns(rows, direction)
    scratch = None if direction is None else rows.x.new_empty(n_rows * step)

    for start, stop in chunks(call, 0, step, step):
        weight = rows.weight[start:stop].to(call.dtype)
        # a frozen head: S is used at once and never kept
        if direction is not None:
            assert scratch is not None
            s = _scratch_of(scratch, rows, stop - start)
            launch.logits(rows, weight, start, rows.target_logits, sums, s)
            direction += precision.matmul(s[:, : stop - start], weight)
            continue

        launch.logits(rows, weight, start, rows.target_logits, sums, stash, start)


def stashed_columns(saved: Saved, start: int, stop: int) -> Tensor:
    """Columns start … stop − 1 of the stash, for the backward's rows."""
    assert saved.kept is not None
    s = saved.kept[:, start:stop]
    return s if saved.rows is None else s.index_select(0, saved.rows)


def _scratch_of(scratch: Tensor, rows: Rows, n_columns: int) -> Tensor:
    """The start of `scratch` as a contiguous [N, whole tiles]; the kernel sets columns from `n_columns` on to 0."""
    n_rows, tile = rows.call.hidden.shape[0], rows.columns
    width = -(-n_columns // tile) * tile
    return scratch[: n_rows * width].view(n_rows, width)


def _finish_direction(call: HeadCall, logps: Tensor, state: Tensor, direction: Tensor, keep: Keep) -> None:
    """d logp / d hidden from Σ S_j W_j, written over it: the gradient of the rows with a coefficient of 1."""
    by = factors_of(call, Saved(logps, state, None, None, None, keep), None, None)
    finish(call, direction, by, out=direction)


def backward(call: HeadCall, saved: Saved, grad_logps: Tensor, grad_entropy: Tensor | None, needs: Needs) -> Gradients:
    """See `base.Backend.backward`."""
    if saved.keep.is_direction:
        assert saved.kept is not None
        direction = saved.kept if saved.rows is None else saved.kept.index_select(0, saved.rows)
        return Gradients((direction * grad_logps.unsqueeze(1)).to(call.hidden.dtype), None, None)
    if grad_entropy is not None:  # rare: recomputed in plain torch
        recomputed = saved._replace(kept=None, keep=Keep.nothing())
        return EagerBackend().backward(call, recomputed, grad_logps, grad_entropy, needs)
    with precision.full(call.hidden.device):
        return _backward(call, saved, grad_logps, needs)


def _backward(call: HeadCall, saved: Saved, grad_logps: Tensor, needs: Needs) -> Gradients:
    # S is the gradient of logp up to one factor r per row, which goes to the [N, H] side of each product
    rows = Rows.of(call, forward=False)
    trained_x = rows.x[:, needs.from_column :]
    by = factors_of(call, saved, grad_logps, trained_x if needs.weight else None)
    dx: Tensor | None = None
    dw = call.weight.new_empty((call.weight.shape[0], trained_x.shape[1])) if needs.weight else None
    db = by.r.new_empty(call.weight.shape[0]) if needs.bias else None
    by_target = SortedRows.of(rows.targets, call.weight.shape[0], by.t) if needs.weight or needs.bias else None

    # one product takes the whole stash, unless its rows or W have to be copied for it
    stashed, step = min(saved.keep.n_columns, call.weight.shape[0]), chunk_columns(call, rows.columns)
    copied = call.weight.dtype != call.dtype or saved.rows is not None
    at_once = step if copied else max(stashed, 1)

    scratch = None
    for start, stop in chunks(call, stashed, at_once, step):
        weight = rows.weight[start:stop].to(call.dtype) if needs.hidden or stop > stashed else None

        # stashed columns are read, the others recomputed with the same k
        if stop <= stashed:
            s = stashed_columns(saved, start, stop)
        else:
            assert weight is not None
            scratch = rows.x.new_empty(rows.x.shape[0] * step) if scratch is None else scratch
            s = _scratch_of(scratch, rows, stop - start)
            launch.logits(rows, weight, start, by.k, None, s)
            s = s[:, : stop - start]

        if needs.hidden:
            assert weight is not None
            product = precision.matmul(s, weight)
            dx = product if dx is None else dx.add_(product)
        if dw is not None:
            assert by.scaled_x is not None
            assert by_target is not None
            _weight_gradient(dw, start, s, by.scaled_x, trained_x, by_target)
        if db is not None:
            db[start:stop] = precision.vector_matmul(by.r, s)

    if dx is not None:
        dx = finish(call, dx, by, out=torch.empty_like(dx, dtype=call.hidden.dtype))
    if db is not None:
        assert by_target is not None
        by_target.add_to(db.unsqueeze(1), torch.ones_like(by.t).unsqueeze(1), 0)
    return Gradients(dx, dw, None if db is None or call.bias is None else db.to(call.bias.dtype))


def _weight_gradient(dw: Tensor, start: int, s: Tensor, scaled_x: Tensor, x: Tensor, by_target: SortedRows) -> None:
    """Rows of dW from `start` on, one per column of `s` [N, C]: Sᵀ·(r ⊙ X) and the targets' terms, rounded once."""
    stop = start + s.shape[1]
    if s.dtype == dw.dtype == torch.float32:
        precision.matmul_into(dw[start:stop], s.t(), scaled_x)
        by_target.add_to(dw[start:stop], x, start)
        return

    step = max(64, SLAB_ELEMENTS // max(1, x.shape[1]) // 64 * 64)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        slab = precision.matmul(s[:, first - start : last - start].t(), scaled_x)
        by_target.add_to(slab, x, first)
        dw[first:last] = slab
