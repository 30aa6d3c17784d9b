"""Parts of a step on a GPU, and what the plain step leaves out: `python -m benchmarks.parts [--parts leaves …]`

    leaves     the reference's forward, no gradient: torch's product alone (cuBLAS) and each backend's whole forward
    logits     existing logits to log-probs and back, beside torch's own and a copy of the logits
    softcap    the head of Gemma 2, whose logits go through a tanh
    ddp        the step inside DistributedDataParallel of one process, whose buckets cost a copy of every gradient
    packed     a transformer's forward and backward: eight sequences packed in one row, by attention, and padded

The cases of a part take turns in one process, as in `together.py`. gemms are the bare products.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import head, measure, records, together
from benchmarks.problem import CannotRun, Problem
from benchmarks.rivals import gemms
from sdpo_kernels import fused_linear_dpo, linear_logps, logits_logps

Prepare = Callable[[], Callable[[], Any]]
SIZES = {"leaves": (8192, 4096, 128256), "logits": (8192, 0, 128256), "softcap": (8192, 2304, 256000),
         "ddp": (8192, 2048, 151936), "packed": (4096, 2048, 32000)}  # fmt: skip
TINY = {"leaves": (16, 32, 300), "logits": (16, 0, 300), "softcap": (16, 32, 300), "ddp": (16, 32, 300),
        "packed": (64, 32, 61)}  # fmt: skip
SOFTCAP = 30.0


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen parts; 1 if one of our cases could not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--jsonl", type=Path, help="append each measurement here as it is made")
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    start = measure.report("parts", arguments, torch.get_num_threads(), device)
    status = 0
    for part in options.parts:
        status |= measure_part(part, device, options.repeats, options.jsonl, start)
    return status


def measure_part(part: str, device: torch.device, repeats: int, jsonl: Path | None, start: dict[str, Any]) -> int:
    """Measure one part's cases in turn, and print them as a table."""
    rows, hidden, vocab = (TINY if device.type == "cpu" else SIZES)[part]
    shape = {"part": part, "rows": rows, "hidden": hidden or None, "vocab": vocab}
    run = records.Run(jsonl, start | {"name": f"parts-{part}", "shape": shape})
    torch.manual_seed(0)
    together.take_turns(dict(PARTS[part](rows, hidden, vocab, device)), device, repeats, run.add)

    answers = {case: [answer] for case, answer in records.case_answers(run.lines).items()}
    results = records.case_results(answers)
    print(head.show(start | {"shape": shape, "results": results}), flush=True)
    return measure.exit_status(results, device.type)


def backends(device: torch.device) -> dict[str, str]:
    """Our cases and their backends; on CUDA by name, so that plain torch cannot pass for one of them."""
    if device.type == "cpu":
        return {"ours": "auto"}
    return {"ours": "triton", "ours_native": "native"}


def leaves(rows: int, hidden: int, vocab: int, device: torch.device) -> Iterator[tuple[str, Prepare]]:
    """One forward without gradient: N·V·H and the reduction to log-probs."""
    x, w, targets = operands(rows, hidden, vocab, device)

    def forward(backend: str) -> Prepare:
        return lambda: torch.no_grad()(lambda: linear_logps(x, w, targets, backend=backend, stash_bytes=0))

    yield "gemms", lambda: torch.no_grad()(lambda: torch.mm(x, w.t()))
    for case, backend in backends(device).items():
        yield case, forward(backend)
    yield "ours_eager", forward("eager")


def logits(rows: int, _: int, vocab: int, device: torch.device) -> Iterator[tuple[str, Prepare]]:
    """bfloat16 logits [N, V] that exist, forward and backward into them."""
    given = torch.randn(rows, vocab, device=device).bfloat16().requires_grad_()
    targets = torch.randint(vocab, (rows,), device=device)

    def ours(inplace: bool) -> Callable[[], None]:
        def call() -> None:
            given.grad = None
            # a leaf must keep its values: the copy is in both cases, and in torch's
            logits_logps(given * 1.0, targets, inplace_backward=inplace).sum().backward()

        return call

    def torchs() -> None:
        given.grad = None
        (-F.cross_entropy((given * 1.0).float(), targets, reduction="none")).sum().backward()

    yield "copy", lambda: lambda: given.detach().clone()
    yield "ours", lambda: ours(False)
    yield "ours_in_place", lambda: ours(True)
    yield "torch", lambda: torchs


def softcap(rows: int, hidden: int, vocab: int, device: torch.device) -> Iterator[tuple[str, Prepare]]:
    """One DPO step at a head with softcap."""
    problem = whole_problem(rows, hidden, vocab, device)

    def step(backend: str) -> Callable[[], None]:
        def call() -> None:
            problem.zero_grad()
            fused_linear_dpo(
                problem.hidden, problem.weight, problem.labels, ref_hidden=problem.ref_hidden,
                ref_weight=problem.ref_weight, softcap=SOFTCAP, backend=backend,
            ).loss.backward()  # fmt: skip

        return call

    yield "gemms", lambda: gemms(problem)
    for case, backend in backends(device).items():
        yield case, lambda backend=backend: step(backend)


def ddp(rows: int, hidden: int, vocab: int, device: torch.device) -> Iterator[tuple[str, Prepare]]:
    """A head as a module, alone and wrapped."""
    x, _, targets = operands(rows, hidden, vocab, device)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(hidden, hidden, bias=False, device=device, dtype=torch.bfloat16)
            self.head = torch.nn.Linear(hidden, vocab, bias=False, device=device, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear_logps(self.body(x), self.head.weight, targets).logps

    def step(model: torch.nn.Module) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad()
            model(x).sum().backward()

        return call

    def wrapped() -> Callable[[], None]:
        if not torch.distributed.is_initialized():
            store = f"file://{tempfile.mkdtemp()}/store"
            kind = "nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(kind, init_method=store, rank=0, world_size=1)
        return step(torch.nn.parallel.DistributedDataParallel(Model()))

    yield "ours", lambda: step(Model())
    yield "ours_in_ddp", wrapped


def packed(rows: int, hidden: int, vocab: int, device: torch.device) -> Iterator[tuple[str, Prepare]]:
    """Two layers of a Llama over eight sequences of different lengths, `rows` tokens in all."""
    import transformers

    from sdpo_kernels.integrations.packed_attention import use_packed_attention

    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4 if hidden < 128 else hidden // 128, max_position_embeddings=rows,
    )  # fmt: skip
    lengths = [rows * share // 36 for share in range(1, 9)]
    ids = [torch.randint(3, vocab, (length,), device=device) for length in lengths]
    row = {"input_ids": torch.cat(ids)[None]}
    row["position_ids"] = torch.cat([torch.arange(len(s), device=device) for s in ids])[None]
    padded = {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)}
    mask = [torch.ones_like(s) for s in ids]
    padded["attention_mask"] = torch.nn.utils.rnn.pad_sequence(mask, batch_first=True)

    def step(only: str | None, inputs: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        if only == "flex_attention" and device.type == "cpu":
            raise CannotRun("it has no backward on the CPU")
        # a model writes its attention into its config
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa")
        model = model.to(device, torch.bfloat16)
        reason = None if inputs is padded else use_packed_attention(model, only=only)
        if reason is not None:
            raise CannotRun(reason)

        def call() -> None:
            model.zero_grad()
            model.get_decoder()(**inputs, use_cache=False).last_hidden_state.float().square().mean().backward()

        return call

    yield "padded_sdpa", lambda: step(None, padded)
    yield "ours", lambda: step("sdpo_packed", row)
    yield "flex_attention", lambda: step("flex_attention", row)


PARTS: dict[str, Callable[[int, int, int, torch.device], Iterator[tuple[str, Prepare]]]] = {
    "leaves": leaves, "logits": logits, "softcap": softcap, "ddp": ddp, "packed": packed,
}  # fmt: skip


def operands(rows: int, hidden: int, vocab: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight and targets, all rows scored."""
    x = torch.randn(rows, hidden, device=device).bfloat16()
    w = (torch.randn(vocab, hidden, device=device) * (3 / hidden**0.5)).bfloat16()
    return x, w, torch.randint(vocab, (rows,), device=device)


def whole_problem(rows: int, hidden: int, vocab: int, device: torch.device) -> Problem:
    """A DPO problem of four pairs, all rows scored."""
    return Problem.random(4, rows // 8, hidden, vocab, 1.0, torch.bfloat16, str(device))


if __name__ == "__main__":
    status = main()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)
