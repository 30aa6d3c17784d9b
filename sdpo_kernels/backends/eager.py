"""The eager backend: plain torch on any device and dtype, one walk over the vocabulary in chunks with all rows in each.

Logits are float32 whatever the operands' dtype (float64 for float64); the arithmetic on them is in `chunk_math.py`.

Forward:
    1. take the next chunk of W and multiply it by all rows: logits z
    2. stash z, if the backward gets a stash
    3. add z to the running sums
    4. frozen head only: add the chunk's part of d logp / d hidden
    5. after the last chunk: log-probs and extras from the sums

Backward:
    1. frozen head: one product with what the forward kept, and no walk
    2. else walk again: logits from the stash or recomputed, dL/dz, and with it dX, dW and db
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sdpo_kernels.backends import eager_logits, grad_tol, precision
from sdpo_kernels.backends.base import Gradients, HeadCall, HeadForward, Keep, Needs, Request, Saved, SliceForward
from sdpo_kernels.backends.chunk_math import RunningSums, dlogits
from sdpo_kernels.head import product_dtype

CHUNK_ELEMENTS = 2**23  # logits plus weights of one chunk: 32 MiB in float32
CUDA_CHUNK = 8  # times as much on a CUDA device, where large products are faster
FLOAT16_BITS = 15  # float16 ends just below 2**16
CHUNK_MULTIPLE = 128  # of columns: whole tiles of matrix products and aligned rows


class EagerBackend:
    """Plain torch; the reference implementation that faster backends are compared with."""

    name = "eager"
    device_types: tuple[str, ...] | None = None
    asserts_inputs = False
    state_columns = 1  # logsumexp over all columns, float64: rounded to float32, one of 20 would cost gradients 1e-6

    def stash_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The stash holds logits in the dtype that products are summed in."""
        return product_dtype(dtype)

    def uses_grad_tol(self, device: torch.device) -> bool:
        """Yes, to be compared with; it is not faster for it."""
        return True

    def supports(self, request: Request) -> str | None:
        """Every device and floating dtype that linear_logps accepts."""
        return None

    def supports_pairs(self, device: torch.device) -> str | None:
        """No: autograd through losses/ is its pair epilogue."""
        return "it computes pair losses by autograd"

    def pair_epilogue(self, *_: Any) -> None:
        """Not implemented, see `supports_pairs`."""
        raise NotImplementedError

    def supports_rows(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Every device and floating dtype that logits_logps accepts."""
        return None

    logits_forward = staticmethod(eager_logits.logits_forward)
    logits_backward = staticmethod(eager_logits.logits_backward)

    def forward(self, call: HeadCall, keep: Keep) -> HeadForward:
        """See `base.Backend.forward`."""
        with precision.full(call.hidden.device):
            sums, kept, tile_sums = self._forward(call, keep)
        out = sums.finish(call.weight.shape[0], kept)
        if tile_sums is None:
            return out

        # relative to the columns without the target, or to all; a target that is NaN or inf is not in the first
        whole = (
            sums.rest.masked_fill(out.logps.isnan(), torch.nan).unsqueeze(1) if keep.grad_tol_relative else out.state
        )
        masses = (tile_sums - whole).exp()
        tiles = grad_tol.kept_tiles(masses, call.targets // grad_tol.TILE, keep.grad_tol)
        return out._replace(tiles=grad_tol.packed(tiles, call.kept_rows))

    def supports_slices(self, request: Request) -> str | None:
        """Whatever linear_logps accepts."""
        return None

    def target_logits(self, call: HeadCall) -> Tensor:
        """See `base.Backend.target_logits`."""
        x, w = (t.to(call.dtype).double() for t in (call.hidden, call.weight.index_select(0, call.known_targets)))
        a = (x * w).sum(1)
        if call.bias is not None:
            a += call.bias.index_select(0, call.known_targets).double()
        return call.head.logits_(a).masked_fill(call.targets < 0, 0.0)

    def slice_forward(self, call: HeadCall, target_logits: Tensor, keep: Keep) -> SliceForward:
        """See `base.Backend.slice_forward`; with a running maximum, the targets' logits are not needed."""
        with precision.full(call.hidden.device):
            sums, kept, _ = self._forward(call, keep)
        return sums.of_slice(kept)

    def _forward(self, call: HeadCall, keep: Keep) -> tuple[RunningSums, Tensor | None, Tensor | None]:
        """The sums over all columns, what is kept, and with a tolerance the log-sum of each tile [N, T]."""
        x = _operand(call.hidden, call)
        sums = RunningSums(x.shape[0], x.device, product_dtype(call.dtype), call.outputs)

        # rows past N and columns past V are padding, which must hold no garbage
        width = call.weight.shape[1] if keep.is_direction else keep.n_columns
        kept = x.new_empty((call.kept_rows, width), dtype=product_dtype(call.dtype))
        kept[x.shape[0] :].zero_()
        kept[:, call.weight.shape[0] :].zero_()
        direction = kept[: x.shape[0]].zero_() if keep.is_direction else None
        stash = kept[: x.shape[0], : keep.n_columns]

        tile_sums: list[Tensor] = []
        scale = _scale(x.dtype, sums.rest.new_full((), _steepest(call)))
        # chunks do not depend on what is kept: policy and reference get the same bits
        for start, stop in vocabulary_chunks(call):
            w = _operand(call.weight[start:stop], call)
            z = _logits(x, w, call, start, stop)
            if start < keep.n_columns:
                stash[:, start:stop] = z[:, : keep.n_columns - start]
            probs, shrink = sums.add(z, call.targets - start)
            if keep.grad_tol > 0:
                tile_sums.append(_log_sums_of_tiles(probs) + sums.rest.unsqueeze(1))

            # `probs` are relative to the sum so far, so what earlier chunks added shrinks as the sum grows
            if direction is not None:
                call.head.times_slope_(probs, z)
                products = precision.matmul(probs.mul_(scale).to(w.dtype), w)
                direction.mul_(shrink.unsqueeze(1)).sub_(products.div_(scale))

        if direction is not None:
            self._add_target_(direction, call, sums.z_target)
        kept_or_none = kept if keep.is_direction or keep.n_columns else None
        return sums, kept_or_none, torch.cat(tile_sums, 1) if tile_sums else None

    def _add_target_(self, direction: Tensor, call: HeadCall, z_target: Tensor) -> None:
        """Add the targets' rows of W, times their slopes, to `direction` [N, H]."""
        ones = torch.ones_like(direction[:, 0])
        slope = call.head.times_slope_(ones, z_target.to(direction.dtype, copy=True))
        w_target = call.weight.index_select(0, call.targets).to(call.dtype)
        direction.addcmul_(slope.unsqueeze(1), w_target.to(direction.dtype))

    def backward(
        self, call: HeadCall, saved: Saved, grad_logps: Tensor, grad_entropy: Tensor | None, needs: Needs
    ) -> Gradients:
        """See `base.Backend.backward`."""
        coefficient = grad_logps.to(saved.logps.dtype)
        if not saved.keep.is_direction:
            with precision.full(call.hidden.device):
                return self._backward(call, saved, coefficient, grad_entropy, needs)

        assert saved.kept is not None
        rest_prob = -torch.expm1(saved.logps)
        dx = _rows_of(saved.kept, saved.rows) * (coefficient * rest_prob).unsqueeze(1)
        return Gradients(dx.to(call.hidden.dtype), None, None)

    def _backward(
        self, call: HeadCall, saved: Saved, coefficient: Tensor, grad_entropy: Tensor | None, needs: Needs
    ) -> Gradients:
        x = _operand(call.hidden, call)
        dx = torch.zeros_like(x, dtype=product_dtype(call.dtype)) if needs.hidden else None
        trained_x = x[:, needs.from_column :]
        dw = call.weight.new_empty((call.weight.shape[0], trained_x.shape[1])) if needs.weight else None
        of_target = None if x.dtype == product_dtype(call.dtype) else torch.zeros_like(coefficient)
        db = call.bias.new_empty(call.bias.shape) if needs.bias and call.bias is not None else None

        scale = _scale(x.dtype, _largest(call, saved, coefficient, grad_entropy))
        stashed = min(saved.keep.n_columns, call.weight.shape[0])
        tiles = None  # those that are taken; the entropy's gradient has no bound by probabilities, so it takes all
        if saved.tiles is not None and grad_entropy is None:
            n_tiles = -(-call.weight.shape[0] // grad_tol.TILE)
            tiles = grad_tol.unpacked(_rows_of(saved.tiles, saved.rows), n_tiles)
        for start, stop in vocabulary_chunks(call, stashed):
            w = _operand(call.weight[start:stop], call)
            if stop <= stashed:
                assert saved.kept is not None
                z = _rows_of(saved.kept[:, start:stop], saved.rows).clone()
            else:
                z = _logits(x, w, call, start, stop)

            # dL/dz, then by the chain rule dL/da of a = x·w + b; z is scratch from here on
            grad = dlogits(z, call.targets - start, saved, coefficient, grad_entropy)
            call.head.times_slope_(grad, z)
            if tiles is not None:
                _leave_out_(grad, tiles[:, start // grad_tol.TILE :])

            # db is summed before the gradient is rounded to the operands' dtype
            if db is not None:
                db[start:stop] = grad.sum(0)
            # the target's coefficient is not rounded: its terms are added in float32
            taken = None
            if of_target is not None:
                taken = _take_targets_(grad, call.targets - start)
                of_target += taken[0]

            grad = grad.mul_(scale).to(w.dtype)
            if dw is not None:
                dw[start:stop] = _weight_gradient(grad, scale, trained_x, taken)
            if dx is not None:
                dx += precision.matmul(grad, w).div_(scale)

        if dx is not None and of_target is not None:
            dx.addcmul_(
                of_target.unsqueeze(1), _operand(call.weight.index_select(0, call.known_targets), call).to(dx.dtype)
            )
        return Gradients(None if dx is None else dx.to(call.hidden.dtype), dw, db)


def vocabulary_chunks(call: HeadCall, border: int = 0) -> Iterator[tuple[int, int]]:
    """(start, stop) of the walk's chunks; they depend on shapes and kind of device only, and one ends at `border`."""
    n_columns, width = call.weight.shape
    elements = CHUNK_ELEMENTS * (CUDA_CHUNK if call.hidden.is_cuda else 1)
    step = max(1, elements // (call.hidden.shape[0] + width) // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    for first, last in ((0, border), (border, n_columns)):
        for start in range(first, last, step):
            yield start, min(start + step, last)


def _log_sums_of_tiles(probs: Tensor) -> Tensor:
    """The log-sum of each tile of a chunk [N, C], float64."""
    tiles = -(-probs.shape[1] // grad_tol.TILE)
    padding = tiles * grad_tol.TILE - probs.shape[1]
    whole = torch.nn.functional.pad(probs, (0, padding)).view(len(probs), tiles, grad_tol.TILE)
    return whole.sum(2, dtype=torch.float64).log()


def _leave_out_(grad: Tensor, tiles: Tensor) -> None:
    """Set the columns of a chunk [N, C] to 0 where `tiles`, from the chunk's first one on, are False."""
    columns = torch.arange(grad.shape[1], device=grad.device) // grad_tol.TILE
    grad.masked_fill_(~tiles.index_select(1, columns), 0.0)


def _take_targets_(grad: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Move the targets' entries of a chunk [N, C] out of `grad`, leaving 0; 0 where the target is in another chunk.

    Returns them and their columns; rows of other chunks name different columns, whose sums of 0 are then as short.
    """
    inside = (columns >= 0) & (columns < grad.shape[1])
    spread = torch.arange(len(columns), device=columns.device) % grad.shape[1]
    column = torch.where(inside, columns, spread)
    value = grad.gather(1, column.unsqueeze(1)).squeeze(1)
    grad.scatter_(1, column.unsqueeze(1), torch.where(inside, 0.0, value).unsqueeze(1))
    return torch.where(inside, value, 0.0), column


def _steepest(call: HeadCall) -> float:
    """The largest dz/da."""
    return abs(call.head.logit_scale / call.head.temperature)


def _largest(call: HeadCall, saved: Saved, coefficient: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """What no entry of dL/da exceeds: |g| for the log-prob; |h|·(1 + H) for the entropy's p|log p + H|."""
    if not coefficient.shape[0]:
        return coefficient.new_zeros(())
    bound = coefficient.abs()
    if grad_entropy is not None:
        assert saved.entropy is not None
        bound = bound + grad_entropy.abs().to(bound.dtype) * (1.0 + saved.entropy)
    return bound.amax() * _steepest(call)


def _scale(dtype: torch.dtype, bound: Tensor) -> Tensor | float:
    """What operands of at most `bound` are multiplied by: for float16 the power of 2 that makes best use of its range.

    Without it, coefficients below 6e-8 would be 0 there: most of a large vocabulary's. With it that is 5e-12 of the
    largest one.
    """
    if dtype != torch.float16:
        return 1.0
    _, exponent = torch.frexp(bound.float())
    scale = torch.ldexp(torch.ones_like(bound, dtype=torch.float32), (FLOAT16_BITS - exponent).clamp(-126, 126))
    return torch.where(bound.isfinite() & (bound > 0), scale, 1.0)


def _weight_gradient(grad: Tensor, scale: Tensor | float, x: Tensor, taken: tuple[Tensor, Tensor] | None) -> Tensor:
    """Gradient [C, H] of a chunk's rows of W by x [N, H], not yet rounded, with what `_take_targets_` returned."""
    sums = precision.matmul(grad.t(), x).div_(scale)
    if taken is None:
        return sums
    # index_put_ sums rows that share a target in a fixed order, on CUDA, too; index_add_ does not
    value, column = taken
    return sums.index_put_((column,), value.unsqueeze(1) * x, accumulate=True)


def _rows_of(kept: Tensor, rows: Tensor | None) -> Tensor:
    return kept if rows is None else kept.index_select(0, rows)


def _logits(x: Tensor, w: Tensor, call: HeadCall, start: int, stop: int) -> Tensor:
    """The logits z [N, stop − start] of a chunk, in the product dtype."""
    z = precision.matmul(x, w.t())
    if call.bias is not None:
        z += call.bias[start:stop].to(z.dtype)
    return call.head.logits_(z)


def _operand(tensor: Tensor, call: HeadCall) -> Tensor:
    """`tensor` rounded to the call's dtype, then cast to what the products take."""
    rounded = tensor.to(call.dtype)
    # tensor cores sum products of halves in float32; elsewhere halves have to be upcast
    if precision.multiplies(rounded.device, call.dtype):
        return rounded
    return rounded.to(product_dtype(call.dtype))
