"""What a published model's folder needs besides its weights: configs that are right and can be saved, files beside it.

keep_generation_config(model)             # before anything saves `model`, checkpoints included
copy_beside("models/base", Path("run/stage-1-easy"), code=False)
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import cached_file

# a model's files that neither `save_pretrained` of the model nor of the tokenizer writes; what those wrote stays
BESIDE = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
_PATTERNS = ("*.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*")


class _KeptGenerationConfig(GenerationConfig):
    """A generation config that is saved as it is, although transformers would refuse to."""

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Accept everything: the values were there before training, and training does not use them."""


def keep_generation_config(model: Any) -> str | None:
    """Let a generation config that transformers refuses to save be saved unchanged; returns what it refuses, or None.

    Many published models have one, such as `do_sample: false` with a temperature. transformers loads it, but saves it
    only as long as nothing in it has changed, and Trainer writes the tokenizer's special tokens into it.
    """
    own = getattr(model, "generation_config", None)
    if not isinstance(own, GenerationConfig):
        return None
    try:
        own.validate(strict=True)
    except ValueError as error:
        own.__class__ = _KeptGenerationConfig
        return generation_problem(error)
    return None


def generation_problem(error: ValueError) -> str:
    """The problems that transformers lists about a generation config, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(line[2:] for line in lines if line.startswith("- ")) or lines[0]


def is_tied(model: Any) -> bool:
    """Whether the head's weight is the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight


def says_tied(config: Any) -> bool:
    """Whether a model's config says that its head's weight is the embedding's."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def say_untied(config: Any) -> None:
    """Make a model's config say that its head has a weight of its own."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False


def say_dtype(config: Any, dtype: torch.dtype, folder: Path) -> None:
    """Save a model's config again with the dtype of its saved weights: DeepSpeed has rounded the model's own."""
    config.dtype = dtype
    config.save_pretrained(folder)


def copy_beside(source: str, target: Path, *, code: bool) -> list[str]:
    """Copy those files of the model `source` (folder or hub name) that no `save_pretrained` writes; return their names.

    These are the configs of processors, chat templates, licences and, with `code`, the model's own Python files. A file
    that `target` already has is left as it is. Of a hub model only what is in the local cache is found by pattern.
    """
    folder = _folder(source)
    if folder is None:
        return []

    patterns = (*BESIDE, *_PATTERNS, *(["*.py"] if code else []))
    found = {path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    copied = sorted(name for name in found if not (target / name).exists())
    for name in copied:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    return [name.as_posix() for name in copied]


def _folder(source: str) -> Path | None:
    """The folder of the model: its own, or a hub model's snapshot in the local cache."""
    if Path(source).is_dir():
        return Path(source)
    optional = {
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }

    # fetches those that the hub has into the snapshot, next to the config
    for name in BESIDE:
        cached_file(source, name, **optional)
    config = cached_file(source, "config.json", **optional)
    return None if config is None else Path(config).parent
