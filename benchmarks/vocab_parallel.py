"""A head whose vocabulary is cut over two processes (tensor parallelism): ours beside torch's loss parallel.

    python -m benchmarks.vocab_parallel [--rows 512] [--width 1024] [--vocab 50257] [--rounds 5] [--json PATH]

Both processes have all rows of the batch, and each has half of the head's rows; a forward and a backward that needs
all gradients, of hidden states and head in `--dtype`.

| case | what it computes |
|---|---|
| `ours`, `ours_without_stash` | `vocab_parallel_linear_logps` |
| `loss_parallel` | the logits as a DTensor cut by columns, and cross_entropy inside `loss_parallel()` |
| `loss_parallel_fp32` | the same, with the logits cast to float32 first, as torchtitan does |
| `naive` | the logits gathered on both processes, and cross_entropy of all of them |
| `naive_fp32` | the same, with float32 operands of the product |

The error is the largest of a log-prob against float64, in nat. `two_ranks.py` says how the rest is measured.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel

from benchmarks import two_ranks
from benchmarks.two_ranks import DTYPES, RANKS, Prepared
from sdpo_kernels import vocab_parallel_linear_logps

TRUTH_COLUMNS = 2048  # of the head at a time in float64


def prepare(rank: int, options: argparse.Namespace) -> Prepared:
    """All rows of the batch, and a rank's rows of the head."""
    everyone, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    dtype, half = DTYPES[options.dtype], -(-options.vocab // RANKS)
    sizes = [half, options.vocab - half]
    hidden = torch.randn(options.rows, options.width, generator=everyone).to(dtype).requires_grad_()
    targets = torch.randint(options.vocab, (options.rows,), generator=everyone)
    weight = (torch.randn(sizes[rank], options.width, generator=own) / options.width**0.5).to(dtype).requires_grad_()
    mesh = init_device_mesh("cpu", (RANKS,))

    def ours(stash_bytes: int | str) -> Tensor:
        out = vocab_parallel_linear_logps(hidden, weight, targets, slice_rows=sizes, stash_bytes=stash_bytes)
        out.logps.sum().backward()
        return out.logps.detach()

    def logits(products: torch.dtype) -> Tensor:
        shape, stride = torch.Size((options.vocab, options.width)), (options.width, 1)
        x = DTensor.from_local(hidden.to(products), mesh, [Replicate()], run_check=False)
        w = DTensor.from_local(weight.to(products), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return F.linear(x, w)

    def torchs(of_logits: torch.dtype) -> Tensor:
        z = logits(dtype).to(of_logits)
        with loss_parallel():
            loss: DTensor = F.cross_entropy(z, targets, reduction="none")  # type: ignore[assignment]
            loss.sum().backward()
        return -loss.detach().to_local()

    def naive(products: torch.dtype) -> Tensor:
        z: DTensor = logits(products)  # type: ignore[assignment]
        loss = F.cross_entropy(z.full_tensor(), targets, reduction="none")
        loss.sum().backward()
        return -loss.detach()

    sides = {
        "ours": lambda: ours("auto"),
        "ours_without_stash": lambda: ours(0),
        "loss_parallel": lambda: torchs(dtype),
        "loss_parallel_fp32": lambda: torchs(torch.float32),
        "naive": lambda: naive(dtype),
        "naive_fp32": lambda: naive(torch.float32),
    }
    return Prepared((hidden, weight), sides, truth(hidden.detach(), weight.detach(), targets, sum(sizes[:rank])))


def truth(hidden: Tensor, weight: Tensor, targets: Tensor, start: int) -> Tensor:
    """Log-probs [N] in float64, a few columns at a time; the same on both processes."""
    x, lse = hidden.double(), hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float64)
    target = torch.zeros_like(lse)
    for first in range(0, len(weight), TRUTH_COLUMNS):
        z = x @ weight[first : first + TRUTH_COLUMNS].double().T
        lse = torch.logaddexp(lse, z.logsumexp(1))
        column = targets - start - first
        inside = (column >= 0) & (column < z.shape[1])
        target += z.gather(1, column.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1).where(inside, 0.0)

    dist.all_reduce(target)
    both = [torch.empty_like(lse) for _ in range(RANKS)]
    dist.all_gather(both, lse)
    return target - torch.logaddexp(*both)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    return two_ranks.main("vocab_parallel", prepare, __doc__ or "", 512, "scored rows of the batch", arguments)


if __name__ == "__main__":
    raise SystemExit(main())
