"""The README.md of a finished stage and of an extrapolated model: what the model is, how it was made, how it scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from sdpo_kernels.stepwise.record.manifest import Record
from sdpo_kernels.stepwise.settings.columns import entry_path
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig
from sdpo_kernels.stepwise.settings.types import is_file_source
from sdpo_kernels.version import __version__

_LEFT_OUT = {"skipped": "bad rows skipped", "dropped": "pairs dropped"}


def model_card(config: RunConfig, stage: Record) -> str:
    """The Markdown model card of a finished stage, with the front matter that the Hugging Face Hub reads."""
    library = "transformers" if config.publishes_merged else "peft"
    lines = [
        *_front_matter(library, config.model, ["dpo", "stepwise-dpo", "preference"]),
        f"# {Path(config.model).name}, stage {stage['index']} ({stage['name']}) of a stepwise DPO run",
        "",
        f"Trained by `sdpo train` of sdpo_kernels {__version__} (sDPO, arXiv 2403.19270).",
        "",
        "| | |",
        "|---|---|",
        f"| loss | {stage['loss']}, beta {stage['beta']:g} |",
        f"| reference | {stage['reference']} |",
        *_training_rows(config, stage),
        *_answer_rows(stage),
        f"| pairs | {_pairs(stage)} |",
        *_missing_rows(config, stage),
        f"| steps | {stage['steps']} |",
        f"| first and last loss | {stage['first_loss']:.4f}, {stage['last_loss']:.4f} |",
    ]

    # a run without eval_data has no scores
    if scores := stage.get("eval"):
        lines += [
            f"| pair accuracy on {scores['pairs']} evaluation pairs | {scores['pair_accuracy']:.3f} |",
            f"| reward accuracy, margin | {scores['reward_accuracy']:.3f}, {scores['reward_margin']:.3f} |",
        ]
    if config.lora is not None:
        lines += ["", _what_is_here(config)]
    return "\n".join(lines) + "\n"


def _training_rows(config: RunConfig, stage: Record) -> list[str]:
    """The settings and data that the stage was trained with."""
    # tiers have names of their own, and share one entry of the settings
    own = next((found for found in config.stages if found.name == stage["name"]), config.stages[0])
    trainer = config.stage_trainer(own)
    steps = trainer.get("max_steps", -1)
    rows = [
        f"| learning rate | {trainer['learning_rate']:g}, {trainer['lr_scheduler_type']} |",
        f"| max_steps | {steps} |" if steps > 0 else f"| epochs | {own.epochs:g} |",
        f"| max_length | {config.max_length} |",
        f"| data | {', '.join(_data_files(config, own))} |",
    ]
    if config.lora is not None:
        rows.append(f"| LoRA | r {config.lora.r}, alpha {config.lora.alpha:g} |")
    if config.quantization is not None:
        rows.append(f"| base while training | {config.quantization.text} |")
    return rows


def _what_is_here(config: RunConfig) -> str:
    """Which weights the folder of a LoRA stage has."""
    if not config.publishes_merged:
        base = "" if config.quantization is None else ", quantised as above"
        return f"The trained weights are the adapter in `adapter/`, for the base `{config.model}`{base}."
    text = "The weights are the base with the adapter merged in float32; the adapter is in `adapter/`."
    if config.quantization is None:
        return text
    return f"{text} The base is the one the adapter was trained on: quantised, then dequantised."


def _data_files(config: RunConfig, stage: StageConfig) -> list[str]:
    """The stage's files, without the folders they are in here, and Hub datasets."""
    stages = config.stages if config.order == "random" else [stage]  # all pairs were dealt out to the stages
    sources = [entry_path(entry) for found in stages for entry in [*(found.data or ()), *(found.prompts or ())]]
    names = [Path(source).name if is_file_source(source) else source for source in sources]
    generated = f" (prompts; pairs by {stage.source.kind})" if stage.source is not None else ""
    return [f"{name}{generated}" for name in dict.fromkeys(names)]


def _answer_rows(stage: Record) -> list[str]:
    """Which model gave the answers of generated pairs, if a server did; not its address, which may be a private one."""
    answered = stage.get("generation") or {}
    if answered.get("engine") != "url":
        return []
    return [f"| answers of the pairs | {', '.join(answered['answered'] or [answered['model']])}, not the policy's |"]


def _missing_rows(config: RunConfig, stage: Record) -> list[str]:
    """What the stage was not trained on, if anything; the records of earlier versions do not say all of it."""
    rows = [f"| {what} | {stage[key]} |" for key, what in _LEFT_OUT.items() if stage.get(key)]
    if stage.get("cut_pairs"):
        counts = f"{stage['cut_pairs']}, losing {stage['lost_tokens']} scored tokens"
        rows.append(f"| pairs cut at {config.max_length} tokens | {counts} |")
    return rows


def _pairs(stage: Record) -> str:
    """How many pairs it was trained on; the records of earlier versions have one number only."""
    used = stage.get("pairs_used")
    return str(stage["pairs"]) if used in (None, stage["pairs"]) else f"{used} of {stage['pairs']}"


def expo_card(start: Path, aligned: Path, alpha: float, notes: Sequence[str], is_adapter: bool) -> str:
    """The Markdown model card of an extrapolated model; `notes` are further lines for its end."""
    library, base = ("peft", start) if is_adapter else ("transformers", aligned)
    what = "a LoRA adapter, its product scaled by 1 + α" if is_adapter else "θ1 + α(θ1 − θ0)"
    lines = [
        *_front_matter(library, str(base), ["expo", "merge", "preference"]),
        f"# {aligned.resolve().name}, extrapolated with α = {alpha:g}",
        "",
        f"Not trained: written by `sdpo expo` of sdpo_kernels {__version__} (ExPO, arXiv 2404.16792): {what}.",
        "",
        "| | |",
        "|---|---|",
        f"| θ0, before alignment | {start} |",
        f"| θ1, aligned | {aligned} |",
        f"| α | {alpha:g} |",
    ]

    if alpha == 0:
        lines += ["", "With α = 0 the weights are those of θ1, unchanged."]
    if notes:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def _front_matter(library: str, base: str, tags: list[str]) -> list[str]:
    return ["---", ModelCardData(library_name=library, base_model=base, tags=tags).to_yaml(), "---"]
