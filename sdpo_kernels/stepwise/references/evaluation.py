"""How well a model ranks pairs: accuracy by log-probs, and reward accuracy and margin relative to a reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.batches import PairDataset
from sdpo_kernels.stepwise.data.order import scored_counts
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.record.manifest import Record
from sdpo_kernels.stepwise.record.samples import SAMPLES_FILE, read_texts
from sdpo_kernels.stepwise.references.cache import read_scores
from sdpo_kernels.stepwise.references.samples import first_prompts, write_answers
from sdpo_kernels.stepwise.references.scorer import Scorer

EVAL_FILE = "eval_logps.safetensors"


def summarise(logps: Tensor, counts: Tensor, reference: Tensor | None, beta: float) -> Record:
    """Metrics of log-probs [n, 2] (chosen, rejected): accuracies with their shares of ties, mean log-probs, their
    margin ("gamma") in nats, and rewards if `reference` is given.

    `counts` [n, 2] are the scored tokens of each answer, `reference` [n, 2] the log-probs that rewards are relative to.
    """
    margin = (logps[:, 0] - logps[:, 1]).double()
    per_token = logps.double() / counts

    # in every accuracy a tie counts as wrong; its share is given too
    scores: Record = {
        "pairs": len(logps),
        "pair_accuracy": _share(margin > 0),
        "pair_accuracy_per_token": _share(per_token[:, 0] > per_token[:, 1]),
        "pair_ties": _share(margin == 0),
        "gamma": float(margin.mean()),
        "logps_chosen": float(logps[:, 0].double().mean()),
        "logps_rejected": float(logps[:, 1].double().mean()),
        "reward_accuracy": None,
        "reward_ties": None,
        "reward_margin": None,
    }

    # DPO's implicit reward, beta * (log pi - log pi_ref)
    if reference is not None:
        rewards = beta * (logps.double() - reference.double())
        scores["reward_accuracy"] = _share(rewards[:, 0] > rewards[:, 1])
        scores["reward_ties"] = _share(rewards[:, 0] == rewards[:, 1])
        scores["reward_margin"] = float((rewards[:, 0] - rewards[:, 1]).mean())
    return scores


def _share(right: Tensor) -> float:
    return float(right.double().mean())


@dataclass
class EvalData:
    """A run's evaluation pairs; each model's log-probs on them are in its folder, those of M_0 in the run's folder."""

    tokens: TokenizedPairs
    folder: Path
    beta: float
    initial: str  # M_0, the initial model: a folder or hub name
    samples: int = 0  # how many prompts each model answers
    tokenizer: PreTrainedTokenizerBase | None = None  # needed for these answers only

    def evaluate(self, model: str, folder: Path, scorer: Scorer, name: str) -> Record:
        """Metrics of `model`; its log-probs are cached in `folder`. Rewards are relative to the initial model.

        `name` is what rows of progress call the model.

        With `samples`, the model's answers to that many prompts are written into `folder`, too.
        """
        tokenizer = self.tokenizer
        if self.samples and tokenizer is not None:
            label = f"{name}: samples"
            ranks.on_first(lambda: write_answers(model, folder, self.tokens, self.samples, tokenizer, scorer, label))
        logps = scorer.score_path(model, self.tokens, f"{name}: evaluation", folder / EVAL_FILE)
        reference = None if folder == self.folder else self.stored(self.folder)
        return summarise(logps, scored_counts(self.tokens), reference, self.beta)

    def lacks_samples(self, folder: Path) -> bool:
        """Whether fewer answers of the model in `folder` are there than are asked for."""
        if not self.samples:
            return False
        written = read_texts(folder / SAMPLES_FILE, ("prompt", "answer"), self.samples)
        return len(written) < len(first_prompts(self.tokens, self.samples))

    def folder_of(self, model: str) -> Path:
        """The folder with the log-probs of `model`: the initial model or a finished stage's."""
        return self.folder if model == self.initial else Path(model)

    def dataset(self, reference: Path | None) -> PairDataset:
        """The pairs with the log-probs in the folder `reference` as their reference; zeros if it is None."""
        logps = torch.zeros(len(self.tokens), 2) if reference is None else self.stored(reference)
        return PairDataset(self.tokens, logps)

    def stored(self, folder: Path) -> Tensor:
        """Log-probs [n, 2] in `folder`; UserError if they are missing or invalid."""
        logps, reason = read_scores(folder / EVAL_FILE, None, len(self.tokens))
        if logps is None:
            raise UserError(f"{folder / EVAL_FILE}: {reason or 'is missing'}; delete that folder to recompute it")
        return logps
