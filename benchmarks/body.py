"""What shared prompts save in a model's body: its forward and backward on the driver's batches, with and without them.

    python -m benchmarks.body [--tasks full1 …] [--pairs 24] [--rounds 3] [--threads 1] [--json PATH]

Tasks, models and batches are those of `benchmarks.step`. Each batch goes through the body both ways in turn, in one
process; times are medians over the rounds after a first one, summed over the batches. "saved" is the part of the time
that is saved, divided by the part of the tokens, and divided by the part of the work: multiply-adds of the layers'
weights and of attention, where the second answer still attends to its prompt and so saves less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, step

TASKS = ("full1", "full2", "full3")


def measure_task(name: str, pairs: int, rounds: int) -> dict[str, Any]:
    """Tokens and seconds of all batches of a task, shared and not."""
    from transformers import AutoModelForCausalLM

    from sdpo_kernels.integrations.causal_lm import attach_fused_head
    from sdpo_kernels.integrations.lm_head import find_head
    from sdpo_kernels.integrations.packed_attention import use_packed_attention, use_shared_prefixes
    from sdpo_kernels.stepwise.data.batches import PairDataset, collate_packed, collate_shared

    task = step.TASKS[name]
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as folder:
        path = step.model_folder(task, Path(made))
        tokens = step.prepare_run(task, step.task_rows(task, pairs), path, Path(folder)).stages[0].tokens
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()

    attach_fused_head(model)
    for prepare in (use_packed_attention, use_shared_prefixes):
        reason = prepare(model)
        if reason is not None:
            raise RuntimeError(f"{name}: {reason}")

    head, data = find_head(model), PairDataset(tokens, torch.zeros(len(tokens), 2))
    examples = [data[i] for i in range(len(tokens))]
    batches = [examples[i : i + step.BATCH] for i in range(0, len(examples), step.BATCH)]
    found: dict[str, Any] = {}
    for batch in batches:
        ways = {"unshared": _inputs(collate_packed(batch)), "shared": _inputs(collate_shared(batch))}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(1 + rounds):
            for way, inputs in ways.items():
                times[way].append(measure.seconds(lambda inputs=inputs: _pass(head, inputs), torch.device("cpu")))
        for way, inputs in ways.items():
            total = found.setdefault(way, {"tokens": 0, "work": 0, "seconds": 0.0})
            total["tokens"] += inputs["input_ids"].numel()
            total["work"] += _work(model.config, inputs["position_ids"])
            total["seconds"] += statistics.median(times[way][1:])

    parts = {key: 1 - found["shared"][key] / found["unshared"][key] for key in ("tokens", "work", "seconds")}
    saved = {f"saved_of_{key}": parts["seconds"] / parts[key] for key in ("tokens", "work")}
    return {"task": name, "pairs": pairs, **found, **saved}


def _work(config: Any, position_ids: torch.Tensor) -> int:
    """Multiply-adds of a forward: of weights with each token, and of each query with its keys and values."""
    from sdpo_kernels.integrations.pieces import pieces

    attended = sum(p.shared * p.length + p.length * (p.length + 1) // 2 for p in pieces(position_ids))
    keys = config.num_key_value_heads * config.head_dim
    weights = 2 * config.hidden_size * (config.hidden_size + keys) + 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (weights * position_ids.numel() + 2 * config.hidden_size * attended)


def _inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the body takes of a packed batch, which is one row."""
    (group,) = batch["groups"]
    return {name: group[name] for name in ("input_ids", "position_ids")}


def _pass(head: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Forward and backward, with a gradient on every hidden state."""
    hidden = head.hidden(**inputs, use_cache=False)
    hidden.backward(torch.ones_like(hidden))


def show(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = []
    for result in report["results"]:
        ratios = [result["unshared"][key] / result["shared"][key] for key in ("tokens", "work", "seconds")]
        cells = [f"{result[way][key]:.5g}" for key in ("tokens", "seconds") for way in ("unshared", "shared")]
        saved = [f"{100 * result[f'saved_of_{key}']:.0f} %" for key in ("tokens", "work")]
        lines.append([result["task"], *cells, *(f"{ratio:.2f}" for ratio in ratios), *saved])
    headings = ["", "tokens", "shared", "seconds", "shared", "tokens ÷", "work ÷", "seconds ÷", "of tokens", "of work"]
    return "\n".join([measure.heading(report), "", measure.table(headings, lines)])


def main(arguments: list[str] | None = None) -> int:
    """Measure all tasks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.body", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=step.TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3, help="passes each way, of which the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)

    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    torch.set_num_threads(options.threads)
    report = measure.report("body", arguments, options.threads, torch.device("cpu")) | {"batch": step.BATCH}
    report["results"] = [measure_task(task, options.pairs, options.rounds) for task in options.tasks]
    print(show(report))
    measure.write_json(options.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
