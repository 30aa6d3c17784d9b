"""The backward with `grad_tol` on a GPU: what it should take by the masks of real text, and what it takes.

    python -m benchmarks.routed --model gemma3 --write      # here: the masks of real logits, some MB, and the model
    python -m benchmarks.routed --model gemma3 --device cuda      # there: times of a backward that keeps just these

`--write` needs what `python -m benchmarks.real` has written, and puts tiles.safetensors beside it in runs/real. The
time of a backward depends on which tiles are kept and not on the values, so that file, which is small enough to be
carried where a model is not, goes with random operands. Accuracy is not measured here.

The model counts the bytes that products load from the second-level cache or memory (`L2`), their arithmetic (`RATE`),
and what passes through memory once (`MEMORY`): a product takes the longer of the first two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import head, measure, real, records, together
from benchmarks.gpu import MODELS
from benchmarks.problem import CannotRun
from sdpo_kernels.backends import BACKENDS
from sdpo_kernels.backends.base import HeadCall, Keep, Needs, Saved
from sdpo_kernels.backends.grad_tol import TILE, unpacked
from sdpo_kernels.head import Head

# one H200, per second: products of torch and of a Triton tile, memory, from the second-level cache to all processors
CEILING, RATE, MEMORY, L2 = 790e12, 600e12, 4.3e12, 5.5e12
OF_CEILING = 0.87  # what Triton's dense tiles reach of it
LAUNCH = 4e-6
BLOCK, LIST, ACROSS = 128, 64, 128  # rows of a block, depth of dW's products, columns of H of a program
BOTH, HIDDEN, WEIGHT = Needs(True, True, False), Needs(True, False, False), Needs(False, True, False)


def main(arguments: list[str] | None = None) -> int:
    """Write masks, or print the model and, on CUDA, measure; 1 if one of our cases could not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--grad-tol", type=float, default=2**-8)
    parser.add_argument("--rows", type=int, default=8192, help="with --write: how many of the real rows")
    parser.add_argument("--write", action="store_true", help="write the masks of real logits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jsonl", type=Path, help="append each measurement here as it is made")
    options = parser.parse_args(arguments)

    device, file = torch.device(options.device), real.RUNS / options.model / "tiles.safetensors"
    if options.write:
        write(file, options.model, options.rows, options.grad_tol)
    if not file.is_file():
        print(f"not measured: {file} is missing: python -m benchmarks.routed --model {options.model} --write")
        return 0
    words, targets, hidden, vocab = read(file)

    start = measure.report("routed", arguments, torch.get_num_threads(), device)
    start |= {"name": f"routed-{options.model}", "structure": structure(words, vocab)}
    start |= {"shape": {"rows": len(words), "hidden": hidden, "vocab": vocab}}
    start["model_ms"] = predicted(start["structure"], len(words), hidden, vocab)
    for part in ("structure", "model_ms"):
        print(part, {name: round(value, 4) for name, value in start[part].items()})
    measure.write_json(options.json, start)
    if device.type != "cuda":
        return 0

    run = records.Run(options.jsonl, start)
    together.take_turns(cases(words, targets, hidden, vocab, options, device), device, options.repeats, run.add)
    results = records.case_results({case: [a] for case, a in records.case_answers(run.lines).items()})
    print(head.show(start | {"results": results}), flush=True)
    return measure.exit_status(results, device.type)


def write(file: Path, model: str, rows: int, tolerance: float) -> None:
    """The masks of the model's first `rows` rows, by the eager backend."""
    from safetensors.torch import save

    from sdpo_kernels.stepwise.common.files import replace_file

    found = real.load(model)
    x, w, targets = found.hidden[:rows].bfloat16(), found.head.bfloat16(), found.targets[:rows]
    words = BACKENDS["eager"].forward(call_of(x, w, targets), Keep.columns(0, tolerance)).tiles
    assert words is not None
    shape = torch.tensor([w.shape[1], w.shape[0]])
    replace_file(file, save({"words": words, "targets": targets.contiguous(), "shape": shape}))


def read(file: Path) -> tuple[Tensor, Tensor, int, int]:
    """Bits [N, words] and targets [N] of real rows, H and V."""
    from safetensors.torch import load_file

    found = load_file(file)
    hidden, vocab = found["shape"].tolist()
    return found["words"], found["targets"], hidden, vocab


def call_of(x: Tensor, w: Tensor, targets: Tensor) -> HeadCall:
    """A plain head in the operands' dtype."""
    return HeadCall(x, w, None, targets, Head(), x.dtype, (), len(x))


def structure(words: Tensor, vocab: int) -> dict[str, float]:
    """Shares of all pairs of a row and a tile: kept, with lists filled up, and of the unions of blocks of rows."""
    n_tiles = -(-vocab // TILE)
    tiles = unpacked(words, n_tiles)
    listed = tiles.sum(0)
    order = tiles.sum(1).argsort(descending=True, stable=True)

    def filled(step: int) -> float:
        return ((listed + step - 1) // step * step).sum().item() / tiles.numel()

    def union(rows: Tensor) -> float:
        return sum(len(part) * part.any(0).sum().item() for part in tiles[rows].split(BLOCK)) / tiles.numel()

    return {
        "kept": tiles.double().mean().item(), "lists_of_64": filled(LIST), "lists_of_128": filled(BLOCK),
        "blocks_sorted": union(order), "blocks_as_they_come": union(torch.arange(len(tiles))),
    }  # fmt: skip


def predicted(shares: dict[str, float], rows: int, hidden: int, vocab: int) -> dict[str, float]:
    """Milliseconds of each part on one H200, bf16, nothing stashed."""
    pairs, across = rows * vocab / TILE, -(-hidden // ACROSS)
    row, element = 2.0 * hidden, 2.0 * TILE  # bytes of a row of x or w; of S of a pair

    def product(loaded: float, pairs_multiplied: float, width: float) -> float:
        return max(loaded / L2, 2 * pairs_multiplied * TILE * width / RATE)

    listed, whole, union = (
        shares["lists_of_128"] * pairs,
        shares["lists_of_64"] * pairs,
        shares["blocks_sorted"] * pairs,
    )
    once = 2.0 * rows * vocab * hidden / CEILING
    chunks = max(1, round(rows * vocab / 2**28))
    parts = {
        # 64 sums of float32 a row are written and read; the lists are made of bits and written as int32
        "choose": 8 * pairs / MEMORY + LAUNCH,
        "lists": (8 + 4 * shares["kept"]) * pairs / L2 + (4 * chunks + 4) * LAUNCH,
        "recompute": product(listed * (row + element) + listed / BLOCK * TILE * row, listed, hidden),
        "dw": product(whole * (row + across * element), whole, across * ACROSS) + vocab * row / MEMORY,
        "dx": product(
            union / BLOCK * TILE * row + across * shares["kept"] * pairs * element, union, across * ACROSS
        ) + chunks * 16 * rows * hidden / L2,
    }  # fmt: skip
    backward = sum(parts.values())
    forward = once / OF_CEILING
    # today: S recomputed, two products, dW in slabs of float32 that are written, read and rounded
    dense = forward + 2 * once + 10 * vocab * hidden / MEMORY
    parts |= {
        "backward": backward, "dense_backward": dense, "backward_ratio": 1e-3 * backward / dense,
        "step_ratio": 1e-3 * (2 * forward + backward) / (2 * forward + dense),
    }  # fmt: skip
    return {name: 1e3 * value for name, value in parts.items()}


def cases(
    words: Tensor, targets: Tensor, hidden: int, vocab: int, options: argparse.Namespace, device: torch.device
) -> dict[str, Callable[[], together.Call]]:
    """Forward and backward with and without a tolerance; a backward with one keeps the real rows' tiles."""
    backend = BACKENDS["triton"]
    reason = None if device.type == "cuda" else "the Triton backend needs CUDA"
    if reason is not None:
        raise CannotRun(reason)
    torch.manual_seed(0)
    x = torch.randn(len(words), hidden, device=device).bfloat16()
    w = (torch.randn(vocab, hidden, device=device) * (3 / hidden**0.5)).bfloat16()
    call, grad = call_of(x, w, targets.to(device)), torch.randn(len(words), device=device)
    tiles = words.to(device)

    def forward(tolerance: float) -> Callable[[], together.Call]:
        return lambda: lambda: backend.forward(call, Keep.columns(0, tolerance))

    def backward(tolerance: float, needs: Needs) -> Callable[[], together.Call]:
        def prepare() -> together.Call:
            keep = Keep.columns(0, tolerance)
            found = backend.forward(call, keep)
            saved = Saved(found.logps, found.state, None, None, None, keep, tiles if tolerance > 0 else None)
            return lambda: backend.backward(call, saved, grad, None, needs)

        return prepare

    def gemms() -> together.Call:
        s = torch.empty(len(words), vocab, device=device, dtype=torch.bfloat16)
        return lambda: (torch.mm(x, w.t(), out=s), torch.mm(s, w), torch.mm(s.t(), x))

    tolerance = options.grad_tol
    return {
        "gemms": lambda: gemms(), "ours_forward": forward(0.0), "ours_forward_tol": forward(tolerance),
        "ours_backward": backward(0.0, BOTH), "ours_backward_tol": backward(tolerance, BOTH),
        "ours_backward_tol_dx": backward(tolerance, HIDDEN), "ours_backward_tol_dw": backward(tolerance, WEIGHT),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
