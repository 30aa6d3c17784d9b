"""The memory plan beside measured peaks: `sdpo check`'s figures for small models, and the driver training them.

    python -m benchmarks.memory [--cases full lora …] [--json PATH]
    python -m benchmarks.memory --plans          # the plans in docs/memory.md
    python -m benchmarks.memory --table          # the table in docs/memory.md, from benchmarks/results/memory-cpu.json

Each case is a fresh process, which plans the case and trains it twice:

    tensors    the most bytes of tensors that existed at once while it trained, counted operation by operation. What the
               kernels of the head allocate for themselves is not in it, nor in the plan beside it.
    resident   the second time: the process's peak resident memory while it trained, minus its resident memory before
               the model was loaded. What libraries keep for themselves after the first time (code that oneDNN makes,
               its scratch memory) is not in it. Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_),
               or it would count.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.memory_plans import large_runs, printed

WORDS, PAIRS = 4000, 20  # of the tokenizer; of a case
LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
WIDE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}

# by name: the model, words of an answer, settings of run.yaml
Case = tuple[dict[str, Any], int, dict[str, Any]]
CASES: dict[str, Case] = {
    "full": (LLAMA, 120, {}),
    "short": (WIDE, 10, {}),
    "long": (LLAMA, 450, {}),
    "bf16": (LLAMA, 120, {"trainer": {"bf16": True}}),
    "checkpointing": (LLAMA, 120, {"trainer": {"gradient_checkpointing": True}}),
    "checkpointing, bf16": (WIDE, 120, {"trainer": {"gradient_checkpointing": True, "bf16": True}}),
    "accumulation": (WIDE, 60, {"trainer": {"gradient_accumulation_steps": 2}}),
    "lora": (LLAMA, 120, {"lora": {"r": 8}}),
    "lora, bf16 base": (WIDE, 120, {"lora": {"r": 8}, "dtype": "bfloat16", "trainer": {"bf16": True}}),
    "ema": (WIDE, 60, {"reference": "ema", "ema": {"decay": 0.5, "sync_steps": 1}}),
    "padded": (LLAMA, 120, {"batching": "padded"}),
    "adafactor": (WIDE, 60, {"trainer": {"optim": "adafactor"}}),
    "tied": (WIDE | {"tie_word_embeddings": True}, 60, {}),
    "Gemma 2": (LLAMA | {"model_type": "gemma2", "head_dim": 32, "num_key_value_heads": 4}, 120, {}),
    "GPT-2": ({"model_type": "gpt2", "n_embd": 256, "n_layer": 6, "n_head": 8}, 120, {}),
    "Mixtral": (LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_key_value_heads": 4}, 60, {}),
    "ddp": (WIDE, 60, {"trainer": {"per_device_train_batch_size": 2}}),
    "fsdp2": (WIDE, 60, {"trainer": {"per_device_train_batch_size": 2, "fsdp": True}}),
    "fsdp2, bf16": (WIDE, 60, {"trainer": {"per_device_train_batch_size": 2, "fsdp": True, "bf16": True}}),
    "fsdp2, accumulation": (
        WIDE, 60, {"trainer": {"per_device_train_batch_size": 2, "fsdp": True, "gradient_accumulation_steps": 2}}
    ),
}  # fmt: skip
RANKS = {"ddp": 2, "fsdp2": 2, "fsdp2, bf16": 2, "fsdp2, accumulation": 2}  # processes with gloo; elsewhere one
PORT = 29731
RESULTS = measure.ROOT / "benchmarks/results/memory-cpu.json"


def make_model(folder: Path, options: dict[str, Any]) -> Path:
    """A random model, by default a Llama, and a tokenizer of WORDS words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)

    settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048} | options
    config = AutoConfig.for_model(settings.pop("model_type", "llama"), vocab_size=WORDS, **settings)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_run(folder: Path, case: Case) -> None:
    """run.yaml, model and data of a case in the new `folder`."""
    from sdpo_kernels.stepwise.settings.yaml_file import write_settings

    options, words, settings = case
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{draw.randrange(WORDS - 4)}" for _ in range(count))

    folder.mkdir()
    # with accumulation the plan's largest micro-batch is a step's second one: here all have the same size
    least = words if "gradient_accumulation_steps" in settings.get("trainer", {}) else words // 2
    lengths = [[draw.randint(least, words) for _ in range(3)] for _ in range(PAIRS)]
    rows = [{"prompt": text(p), "chosen": " " + text(c), "rejected": " " + text(r)} for p, c, r in lengths]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = {"learning_rate": 1e-4, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 1}
    trainer |= {"per_device_eval_batch_size": 4} | settings.get("trainer", {})
    run = {"model": str(make_model(folder / "model", options)), "output_dir": str(folder / "run")}
    run |= settings | {"stages": [{"name": "s1", "data": str(folder / "data.jsonl")}], "trainer": trainer}
    (folder / "run.yaml").write_text(write_settings(run))


def plan_of(config: Any) -> Any:
    """The plan of `sdpo check`."""
    from sdpo_kernels.stepwise.check import planned
    from sdpo_kernels.stepwise.prepare import prepare

    return planned(prepare(config), None).plan


def train_measured(config: Any, counted: bool, *, scoring: bool = False) -> int:
    """Train; the most bytes of tensors that existed while training or, unless `counted`, the peak resident memory.

    With `scoring` what came before training counts, too.
    """
    from transformers import TrainerCallback

    from sdpo_kernels.stepwise.common.progress import Reporter
    from sdpo_kernels.stepwise.memory.live import LiveBytes
    from sdpo_kernels.stepwise.run import run
    from sdpo_kernels.stepwise.training.trainer import StageTrainer

    live, peaks = LiveBytes(), []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if not scoring:
                live.peak = live.now
                measure._reset_peak()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            peaks.append(live.peak if counted else measure._status("VmHWM"))

    made = StageTrainer.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.add_callback(Watch())

    StageTrainer.__init__ = watched  # type: ignore[method-assign]
    try:
        if counted:
            with live:
                run(config, Reporter(quiet=True))
        else:
            run(config, Reporter(quiet=True))
    finally:
        StageTrainer.__init__ = made  # type: ignore[method-assign]
    return max(peaks)


def measure_here(folder: Path) -> dict[str, Any]:
    """Plan and measure the run in `folder`, in this process, which may be one of several ranks."""
    from sdpo_kernels.stepwise.common import ranks
    from sdpo_kernels.stepwise.settings.run_file import load_config

    config = load_config(folder / "run.yaml")
    if config.trainer.get("fsdp"):
        _accept_fsdp_on_cpus()
    plan = plan_of(config)

    # FSDP2 frees the memory under tensors that still exist, which a count of tensors does not see
    first = train_measured(config, counted=not plan.setup.sharded)
    tensors = None if plan.setup.sharded else first

    gc.collect()
    measure._give_back_free_memory()
    before = measure._status("VmRSS")
    again = config.model_copy(update={"output_dir": str(folder / "again")})
    resident = train_measured(again, counted=False) - before
    return {
        "ranks": ranks.launched(),
        "parameters": plan.sizes.numbers,
        "tokens": plan.batch.tokens,
        "moment": plan.fullest.name,
        "parts": plan.fullest.parts,
        "plan": plan.total,
        "resident": resident,
        "plan_tensors": plan.tensors,
        "tensors": tensors,
    }


def _accept_fsdp_on_cpus() -> None:
    """accelerate trains plain DDP on CPUs, whatever is asked; the code path is that of several GPUs."""
    from accelerate import state
    from accelerate.utils import DistributedType

    genuine = state.AcceleratorState.__init__

    def made(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        fresh = not self._shared_state
        genuine(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fresh and fsdp_plugin is not None:
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = made  # type: ignore[method-assign]


def measure_case(name: str, threads: int) -> dict[str, Any]:
    """Measure one case in fresh processes; {"skipped": why} if they fail."""
    case, count = CASES[name], RANKS.get(name, 1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "case"
        make_run(folder, case)
        program = [sys.executable, "-m", "benchmarks.memory", "--child", str(folder)]
        children = [
            subprocess.Popen(
                program,
                cwd=measure.ROOT,
                env=_environment(rank, count, threads),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(count)
        ]
        answers = [child.communicate() for child in children]
    if any(child.returncode for child in children):
        complaint = next(errors for child, (_, errors) in zip(children, answers, strict=True) if child.returncode)
        return {"case": name, "skipped": (complaint.strip().splitlines() or ["no message"])[-1]}
    return {"case": name} | json.loads(answers[0][0].splitlines()[-1])


def _environment(rank: int, count: int, threads: int) -> dict[str, str]:
    """Of one rank; a process alone gets no rank."""
    found = os.environ | {"OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "65536"}
    found |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": PORT}
        found |= {key: str(value) for key, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    return found


HEADINGS = ["case", "million weights", "tokens", "plan", "tensors", "", "plan, all", "resident", ""]


def show(report: dict[str, Any]) -> str:
    """The report as a table."""
    return "\n".join([measure.heading(report), "", measure.table(HEADINGS, _lines(report))])


def markdown(report: dict[str, Any]) -> str:
    """The report as a table in Markdown."""
    rows = [HEADINGS, ["---", *["---:"] * (len(HEADINGS) - 1)], *_lines(report)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _lines(report: dict[str, Any]) -> list[list[str]]:
    lines = []
    for result in report["results"]:
        if "skipped" in result:
            lines.append([result["case"], "not measured", *[""] * (len(HEADINGS) - 2)])
            continue
        cells = [f"{result['parameters'] / 1e6:.1f}", f"{result['tokens']:,}"]
        for plan, measured in (("plan_tensors", "tensors"), ("plan", "resident")):
            cells += _compared(result[plan], result[measured])
        lines.append([result["case"], *cells])
    return lines


def _compared(plan: int, measured: int | None) -> list[str]:
    """Both in MiB, and how far the plan is off."""
    if measured is None:
        return ["", "", ""]
    return [f"{plan / 2**20:.0f}", f"{measured / 2**20:.0f}", f"{100 * (plan / measured - 1):+.1f} %"]


def main(arguments: list[str] | None = None) -> int:
    """Measure all cases, or print the plans of the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--plans", action="store_true", help="print the plans of docs/memory.md, and measure nothing")
    parser.add_argument("--table", action="store_true", help="print the table of docs/memory.md, and measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    if options.plans:
        for title, run in large_runs().items():
            print(f"# {title}", "", printed(*run), "", sep="\n", flush=True)
        return 0
    if options.table:
        print(markdown(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return 0
    if options.child is not None:
        print(json.dumps(measure_here(options.child)), flush=True)
        os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way

    report = measure.report("memory", arguments, options.threads, torch.device("cpu"))
    report["results"] = []
    for name in options.cases:
        report["results"].append(measure_case(name, options.threads))
        measure.write_json(options.json, report)
    print(show(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
