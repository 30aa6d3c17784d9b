"""Sides that two gloo processes on one machine run together, in turn: what `sharded` and `vocab_parallel` share.

Each process has one thread. Times are medians of the slower process. Bytes are what a process receives in its
collectives; it sends as many on average. An all-reduce counts twice what a process has, less its own share, as in a
ring. Memory is the peak of a process minus its memory before the call. Both processes share one machine, so that
sending is copying.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure

RANKS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPERATORS = {  # of c10d and its functional twin: which argument to count, and how often
    "allreduce_": (0, 2),
    "all_reduce": (0, 2),
    "allgather_": (0, 1),
    "_allgather_base_": (0, 1),
    "all_gather_into_tensor": (0, RANKS),  # its argument is a rank's part
    "_reduce_scatter_base_": (1, 1),
    "broadcast_": (0, 1),
    "reduce_": (0, 1),
    "alltoall_base_": (0, 1),
}
WAITING = ("wait_tensor", "_wrap_tensor_autograd", "barrier")


class Prepared(NamedTuple):
    """A rank's part of the problem. Each side is a forward and a backward, and returns its log-probs."""

    leaves: tuple[Tensor, ...]
    sides: dict[str, Callable[[], Tensor]]
    truth: Tensor | None = None  # float64 log-probs; None: errors are not measured


Prepare = Callable[[int, argparse.Namespace], Prepared]


class Traffic(TorchDispatchMode):
    """Counts the bytes that a rank receives in collectives, those inside DTensor's operators, too."""

    def __init__(self) -> None:
        super().__init__()
        self.received = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operator."""
        # DTensor's operators come back with the collectives that they consist of
        if any(kind is DTensor for kind in types):
            return NotImplemented
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._schema.name.split("::")[1]
            if name not in WAITING:
                place, times = OPERATORS[name]
                self.received += times * size(args[place]) * (RANKS - 1) // RANKS
        return function(*args, **(kwargs or {}))


def size(given: Any) -> int:
    """Bytes of a tensor, or of all tensors in lists."""
    if isinstance(given, (list, tuple)):
        return sum(size(one) for one in given)
    return int(given.numel() * given.element_size())


def one_process(rank: int, folder: Path, prepare: Prepare, options: argparse.Namespace) -> None:
    """Measure all sides; a rank's results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    prepared = prepare(rank, options)
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in prepared.sides}

    def fresh() -> None:
        for leaf in prepared.leaves:
            leaf.grad = None
        dist.barrier()

    # not timed: it warms up, too
    for name, run in prepared.sides.items():
        fresh()
        with Traffic() as traffic:
            logps = run()
        found[name]["received"] = traffic.received
        if prepared.truth is not None:
            found[name]["error"] = (logps.double() - prepared.truth).abs().max().item()
        del logps

    for _ in range(options.rounds):
        for name, run in prepared.sides.items():
            fresh()
            begin = time.perf_counter()
            run()
            found[name]["seconds"].append(time.perf_counter() - begin)

    # memory last: it is read from the process, and allocations of earlier rounds would hide it
    for name, run in prepared.sides.items():
        fresh()
        found[name]["extra_bytes"] = measure.peak_extra_bytes(run, torch.device("cpu"))
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def results(prepare: Prepare, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The sides' results of both processes together. `prepare` is a module's function: each process calls it."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=one_process, args=(rank, folder, prepare, options)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError("a process failed; its error is above")
        parts = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]

    return [{"case": name} | joined([part[name] for part in parts]) for name in parts[0]]


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A side's results in both processes as one."""
    slower = [max(times) for times in zip(*(part["seconds"] for part in parts), strict=True)]
    found = {
        "median_s": statistics.median(slower),
        "min_s": min(slower),
        "max_s": max(slower),
        "received_bytes": max(part["received"] for part in parts),
        "extra_bytes": max(part["extra_bytes"] or 0 for part in parts),
    }
    return found | ({"error_nat": max(part["error"] for part in parts)} if "error" in parts[0] else {})


def show(report: dict[str, Any]) -> str:
    """The report as a table."""
    mib, with_errors = 2**20, "error_nat" in report["results"][0]
    lines = [
        [r["case"], *(f"{1000 * r[key]:.0f}" for key in ("median_s", "min_s", "max_s")),
         *(f"{r[key] / mib:.1f}" for key in ("received_bytes", "extra_bytes")),
         *([f"{r['error_nat']:.1e}"] if with_errors else [])]
        for r in report["results"]
    ]  # fmt: skip
    headings = ["", "median ms", "min ms", "max ms", "received MiB", "extra MiB", *(["error"] if with_errors else [])]
    return "\n".join([measure.heading(report), "", measure.table(headings, lines)])


def main(name: str, prepare: Prepare, description: str, rows: int, rows_help: str, arguments: list[str] | None) -> int:
    """The command line of a benchmark: measure and print."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description.splitlines()[0])
    parser.add_argument("--rows", type=int, default=rows, help=rows_help)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5, help="passes of each side, of which the median counts")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)

    report = measure.report(name, arguments, 1, torch.device("cpu"))
    report["shape"] = {key: getattr(options, key) for key in ("rows", "width", "vocab", "dtype")}
    report["results"] = results(prepare, options)
    print(show(report))
    measure.write_json(options.json, report)
    return 0
