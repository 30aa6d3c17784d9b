"""A head sharded over two processes (FSDP2's layout): exchanged in chunks, beside gathering all of it.

    python -m benchmarks.sharded [--rows 256] [--width 1024] [--vocab 50257] [--dtype bf16] [--rounds 5] [--json PATH]

Each process has its own rows of the batch and half of the head's rows, and takes a forward and a backward that needs
all gradients. `sharded` is `sharded_linear_logps`, `sharded_without_stash` recomputes logits in the backward, and
`gathered` gathers the whole head, calls `linear_logps`, and reduce-scatters dW, as FSDP2 does with a group. The sides
take turns. Times are medians of the slower process; bytes are what a process receives in its collectives; memory is the
peak of a process minus its memory before the call. Both processes share one machine, so that sending is copying: what
is shown is what it costs at most where links are as fast as memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import measure
from sdpo_kernels import collectives, linear_logps
from sdpo_kernels.sharded import sharded_linear_logps

RANKS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLLECTIVES = [  # and which argument is what all ranks together send or receive
    (collectives, "all_gather", 0),
    (collectives, "reduce_scatter", 1),
    (dist, "broadcast", 0),
    (dist, "reduce", 0),
    (dist, "all_to_all_single", 0),
]


def gathered(hidden: Tensor, shard: Tensor, targets: Tensor, shard_rows: list[int]) -> None:
    """The whole head on every rank, for one forward and backward."""
    most = max(shard_rows)  # all_gather wants equal parts
    padded = shard.detach().new_zeros((most, shard.shape[1]))
    padded[: len(shard)] = shard.detach()
    parts = padded.new_empty((RANKS * most, shard.shape[1]))
    collectives.all_gather(parts, padded, None)
    whole = torch.cat([part[:rows] for part, rows in zip(parts.split(most), shard_rows, strict=True)]).requires_grad_()
    linear_logps(hidden, whole, targets).logps.sum().backward()

    assert whole.grad is not None
    sums = parts.new_zeros(parts.shape, dtype=torch.float32)
    for part, grad, rows in zip(sums.split(most), whole.grad.split(shard_rows), shard_rows, strict=True):
        part[:rows] = grad
    mine = sums.new_empty(padded.shape)
    collectives.reduce_scatter(mine, sums, None)
    shard.grad = mine[: len(shard)].to(shard.dtype)


def sides() -> dict[str, Callable[..., None]]:
    """Each takes hidden, this rank's shard, targets and the sizes of all shards."""

    def ours(stash_bytes: int | str) -> Callable[..., None]:
        def run(hidden: Tensor, shard: Tensor, targets: Tensor, shard_rows: list[int]) -> None:
            out = sharded_linear_logps(hidden, shard, targets, shard_rows=shard_rows, stash_bytes=stash_bytes)
            out.logps.sum().backward()

        return run

    return {"sharded": ours("auto"), "sharded_without_stash": ours(0), "gathered": gathered}


def one_process(rank: int, folder: Path, options: argparse.Namespace) -> None:
    """Measure all sides; a rank's results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    generator = torch.Generator().manual_seed(rank)
    dtype, half = DTYPES[options.dtype], -(-options.vocab // RANKS)
    shard_rows = [half, options.vocab - half]
    hidden = torch.randn(options.rows, options.width, generator=generator).to(dtype).requires_grad_()
    shard = (torch.randn(shard_rows[rank], options.width, generator=generator) / 32).to(dtype).requires_grad_()
    targets = torch.randint(options.vocab, (options.rows,), generator=generator)
    received = count_bytes()

    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in sides()}
    for turn in range(1 + options.rounds):
        for name, run in sides().items():
            hidden.grad = shard.grad = None
            dist.barrier()
            received["bytes"] = 0
            begin = time.perf_counter()
            run(hidden, shard, targets, shard_rows)
            elapsed = time.perf_counter() - begin
            if turn:
                found[name]["seconds"].append(elapsed)
            found[name]["received"] = received["bytes"]

    # memory last: it is read from the process, and allocations of earlier rounds would hide it
    for name, run in sides().items():
        hidden.grad = shard.grad = None
        dist.barrier()
        call = lambda run=run: run(hidden, shard, targets, shard_rows)  # noqa: E731
        found[name]["extra_bytes"] = measure.peak_extra_bytes(call, torch.device("cpu"))
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def count_bytes() -> dict[str, int]:
    """Add up what a rank receives in collectives from now on."""
    received = {"bytes": 0}

    def counting(module: Any, name: str, place: int) -> None:
        real = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            received["bytes"] += args[place].numel() * args[place].element_size() * (RANKS - 1) // RANKS
            return real(*args, **kwargs)

        setattr(module, name, counted)

    for module, name, place in COLLECTIVES:
        counting(module, name, place)
    return received


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The sides' results of both processes together."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=one_process, args=(rank, folder, options)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError("a process failed; its error is above")
        parts = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]

    results = []
    for name in sides():
        slower = [max(times) for times in zip(*(part[name]["seconds"] for part in parts), strict=True)]
        results.append(
            {
                "case": name,
                "median_s": statistics.median(slower),
                "min_s": min(slower),
                "max_s": max(slower),
                "received_bytes": max(part[name]["received"] for part in parts),
                "extra_bytes": max(part[name]["extra_bytes"] or 0 for part in parts),
            }
        )
    return results


def show(report: dict[str, Any]) -> str:
    """The report as a table."""
    mib = 2**20
    lines = [
        [r["case"], *(f"{1000 * r[key]:.0f}" for key in ("median_s", "min_s", "max_s")),
         *(f"{r[key] / mib:.0f}" for key in ("received_bytes", "extra_bytes"))]
        for r in report["results"]
    ]  # fmt: skip
    headings = ["", "median ms", "min ms", "max ms", "received MiB", "extra MiB"]
    return "\n".join([measure.heading(report), "", measure.table(headings, lines)])


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="scored rows of each process")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each side, of which the median counts")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)

    report = measure.report("sharded", arguments, 1, torch.device("cpu"))
    report["shape"] = {name: getattr(options, name) for name in ("rows", "width", "vocab", "dtype")}
    report["results"] = run(options)
    print(show(report))
    measure.write_json(options.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
