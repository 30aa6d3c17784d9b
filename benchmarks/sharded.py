"""A head sharded over two processes (FSDP2's layout): exchanged in chunks, beside gathering all of it.

    python -m benchmarks.sharded [--rows 256] [--width 1024] [--vocab 50257] [--dtype bf16] [--rounds 5] [--json PATH]

Each process has its own rows of the batch and half of the head's rows, and takes a forward and a backward that needs
all gradients. `sharded` is `sharded_linear_logps`, `sharded_without_stash` recomputes logits in the backward, and
`gathered` gathers the whole head, calls `linear_logps`, and reduce-scatters dW, as FSDP2 does with a group.
`two_ranks.py` says how times, bytes and memory are measured: what is shown is what it costs at most where links are as
fast as memory.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks import two_ranks
from benchmarks.two_ranks import DTYPES, RANKS, Prepared
from sdpo_kernels import collectives, linear_logps
from sdpo_kernels.sharded import sharded_linear_logps


def prepare(rank: int, options: argparse.Namespace) -> Prepared:
    """A rank's rows of the batch and of the head."""
    generator = torch.Generator().manual_seed(rank)
    dtype, half = DTYPES[options.dtype], -(-options.vocab // RANKS)
    shard_rows = [half, options.vocab - half]
    hidden = torch.randn(options.rows, options.width, generator=generator).to(dtype).requires_grad_()
    shard = (torch.randn(shard_rows[rank], options.width, generator=generator) / 32).to(dtype).requires_grad_()
    targets = torch.randint(options.vocab, (options.rows,), generator=generator)

    def ours(stash_bytes: int | str) -> Tensor:
        out = sharded_linear_logps(hidden, shard, targets, shard_rows=shard_rows, stash_bytes=stash_bytes)
        out.logps.sum().backward()
        return out.logps.detach()

    sides = {
        "sharded": lambda: ours("auto"),
        "sharded_without_stash": lambda: ours(0),
        "gathered": lambda: gathered(hidden, shard, targets, shard_rows),
    }
    return Prepared((hidden, shard), sides)


def gathered(hidden: Tensor, shard: Tensor, targets: Tensor, shard_rows: list[int]) -> Tensor:
    """The whole head on every rank, for one forward and backward."""
    most = max(shard_rows)  # all_gather wants equal parts
    padded = shard.detach().new_zeros((most, shard.shape[1]))
    padded[: len(shard)] = shard.detach()
    parts = padded.new_empty((RANKS * most, shard.shape[1]))
    collectives.all_gather(parts, padded, None)
    whole = torch.cat([part[:rows] for part, rows in zip(parts.split(most), shard_rows, strict=True)]).requires_grad_()
    logps = linear_logps(hidden, whole, targets).logps
    logps.sum().backward()

    assert whole.grad is not None
    sums = parts.new_zeros(parts.shape, dtype=torch.float32)
    for part, grad, rows in zip(sums.split(most), whole.grad.split(shard_rows), shard_rows, strict=True):
        part[:rows] = grad
    mine = sums.new_empty(padded.shape)
    collectives.reduce_scatter(mine, sums, None)
    shard.grad = mine[: len(shard)].to(shard.dtype)
    return logps.detach()


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    return two_ranks.main("sharded", prepare, __doc__ or "", 256, "scored rows of each process", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
