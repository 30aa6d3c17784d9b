"""The README.md of an extrapolated model: what it is, made from what, with which α."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from sdpo_kernels.version import __version__


def expo_card(start: Path, aligned: Path, alpha: float, notes: Sequence[str], is_adapter: bool) -> str:
    """A model card in Markdown with the front matter that the hub reads; `notes` are more lines for its end."""
    base = str(start if is_adapter else aligned)
    library = "peft" if is_adapter else "transformers"
    what = "a LoRA adapter, its product scaled by 1 + α" if is_adapter else "θ1 + α(θ1 − θ0)"
    lines = [
        "---",
        ModelCardData(library_name=library, base_model=base, tags=["expo", "merge", "preference"]).to_yaml(),
        "---",
        f"# {aligned.resolve().name}, extrapolated with α = {alpha:g}",
        "",
        f"Not trained: made by `sdpo expo` of sdpo_kernels {__version__} (ExPO, arXiv 2404.16792): {what}.",
        "",
        "| | |",
        "|---|---|",
        f"| θ0, before alignment | {start} |",
        f"| θ1, aligned | {aligned} |",
        f"| α | {alpha:g} |",
        *(["", "With α = 0 the weights are those of θ1, unchanged."] if alpha == 0 else []),
        *(["", *notes] if notes else []),
    ]
    return "\n".join(lines) + "\n"
