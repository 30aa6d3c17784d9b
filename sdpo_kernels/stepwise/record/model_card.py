"""The README.md of a finished stage: what the model is, how it was made, how it scored."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from sdpo_kernels.stepwise.record.manifest import Record
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.version import __version__


def model_card(config: RunConfig, stage: Record) -> str:
    """A model card in Markdown with the front matter that the hub reads."""
    name = Path(config.model).name
    tags = ["dpo", "stepwise-dpo", "preference"]
    lines = [
        "---",
        ModelCardData(library_name="transformers", base_model=config.model, tags=tags).to_yaml(),
        "---",
        f"# {name}, stage {stage['index']} ({stage['name']}) of a stepwise DPO run",
        "",
        f"Trained by `sdpo train` of sdpo_kernels {__version__} (sDPO, arXiv 2403.19270).",
        "",
        "| | |",
        "|---|---|",
        f"| loss | {stage['loss']}, beta {stage['beta']:g} |",
        f"| reference | {stage['reference']} |",
        f"| pairs | {stage['pairs']} |",
        f"| steps | {stage['steps']} |",
        f"| first and last loss | {stage['first_loss']:.4f}, {stage['last_loss']:.4f} |",
    ]
    scores = stage.get("eval")
    if scores:
        lines += [
            f"| pair accuracy on {scores['pairs']} evaluation pairs | {scores['pair_accuracy']:.3f} |",
            f"| reward accuracy, margin | {scores['reward_accuracy']:.3f}, {scores['reward_margin']:.3f} |",
        ]
    if config.lora is not None:
        lines += ["", "The weights are the base with the adapter merged in float32; the adapter lies in `adapter/`."]
    return "\n".join(lines) + "\n"
