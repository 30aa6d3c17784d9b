"""One batch at the head of a language model, its ground truth in float64, and masks from real pairs.

problem = Problem.random(4, 256, 1024, 32000, "real", torch.bfloat16, "cpu")
true_step(problem)          # loss, summed log-probs and gradients, in float64
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
IGNORE_INDEX = -100


class CannotRun(Exception):
    """A peer cannot run here; the message says why."""


class Step(NamedTuple):
    """The results of a step that are checked: the loss and the policy's summed log-probs [2B]."""

    loss: Tensor
    policy_logps: Tensor


@dataclass
class Problem:
    """One batch at the head: chosen half first; policy and reference have the same shape."""

    hidden: Tensor  # [2B, T, H], requires a gradient
    weight: Tensor  # [V, H], requires a gradient
    ref_hidden: Tensor  # [2B, T, H]
    ref_weight: Tensor  # [V, H]
    labels: Tensor  # [2B, T] int64, -100 = not scored
    beta: float = 0.1

    @classmethod
    def random(
        cls, pairs: int, length: int, hidden: int, vocab: int, scored: float | str, dtype: torch.dtype, device: str
    ) -> Problem:
        """Normal hidden states, logits with standard deviation 3; `scored` as in `scored_positions`.

        Drawn on `device`: on the CPU an element takes 5 ns, which is longer than a GPU's whole measurement.

        Time at the head depends on the values only in a backward that skips small gradients, which no case here does.
        """
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        runs = scored_positions(pairs, length, scored, generator)
        labels = torch.randint(vocab, (2 * pairs, length), generator=generator, device=device)
        labels[~runs] = IGNORE_INDEX

        # the reference is close to the policy, as it is in training
        states, head = normal(2 * pairs, length, hidden), normal(vocab, hidden) * (3 / hidden**0.5)
        ref_states, ref_head = states + 0.1 * normal(*states.shape), head + 0.01 * normal(*head.shape) / hidden**0.5

        return cls(
            states.to(dtype).requires_grad_(),
            head.to(dtype).requires_grad_(),
            ref_states.to(dtype),
            ref_head.to(dtype),
            labels,
        )

    def cast(self, dtype: torch.dtype, device: str | None = None) -> Problem:
        """The same numbers in another dtype, and on another device."""
        names = ("hidden", "weight", "ref_hidden", "ref_weight")
        place = torch.device(device) if device else self.labels.device
        changed = {name: getattr(self, name).detach().to(place, dtype) for name in names}
        for name in names[:2]:
            changed[name].requires_grad_()
        return replace(self, **changed, labels=self.labels.to(place))

    def zero_grad(self) -> None:
        """Drop the gradients, before the next step."""
        self.hidden.grad = self.weight.grad = None


def scored_positions(pairs: int, length: int, scored: float | str, generator: torch.Generator) -> Tensor:
    """Mask [2B, T] with one run of scored positions per sequence, on the generator's device.

    `scored` is the share of positions, in a run that starts at a random position, or "real": the positions that are
    neither prompt nor padding in a batch of real pairs.
    """
    if scored == "real":
        found = real_runs(pairs, length)
        starts, ends = torch.tensor(found, device=generator.device).unsqueeze(-1).unbind(1)
    else:
        n_scored = max(1, round(float(scored) * length))
        starts = torch.randint(length - n_scored + 1, (2 * pairs, 1), generator=generator, device=generator.device)
        ends = starts + n_scored

    position = torch.arange(length, device=generator.device)
    return (position >= starts) & (position < ends)


def has_real_masks() -> bool:
    """Whether the real pairs, and the tokenizer that counts their tokens, are there."""
    files = (DATA / "full/stage1_orca_gsm8k.jsonl.gz", DATA / "tokenizers/gpt2/tokenizer.json")
    return importlib.util.find_spec("tokenizers") is not None and all(path.is_file() for path in files)


def real_runs(pairs: int, length: int) -> list[tuple[int, int]]:
    """Scored runs (start, end) of a batch of real pairs, scaled so that the longest sequence fills `length`.

    Chosen sequences first. The batch is always the same draw from the three stages of the full pack.
    """
    lengths = random.Random(0).choices(real_lengths(), k=pairs)
    sequences = [(prompt, completions[side]) for side in (0, 1) for prompt, completions in lengths]

    # at least one scored position in each sequence, whatever the rounding
    longest = max(prompt + completion for prompt, completion in sequences)
    runs = []
    for prompt, completion in sequences:
        end = max(1, round((prompt + completion) * length / longest))
        runs.append((min(round(prompt * length / longest), end - 1), end))
    return runs


@cache
def real_lengths(pairs_a_stage: int = 64) -> list[tuple[int, tuple[int, int]]]:
    """GPT-2 token counts of prompt and completions, for the first pairs of each stage of the full pack."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DATA / "tokenizers/gpt2/tokenizer.json"))

    def tokens(messages: list[dict[str, Any]]) -> int:
        return len(tokenizer.encode("\n".join(message["content"] for message in messages)).ids)

    # the stages in their order, whatever the file system's
    found = []
    for path in sorted((DATA / "full").glob("stage*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for row, _ in zip(map(json.loads, lines), range(pairs_a_stage), strict=False):
                found.append((tokens(row["prompt"]), (tokens(row["chosen"]), tokens(row["rejected"]))))
    return found


class Truth(NamedTuple):
    """The ground truth of a step, in float64."""

    loss: Tensor
    policy_logps: Tensor  # [2B]
    hidden_grad: Tensor  # [2B, T, H]
    weight_grad: Tensor  # [V, H]


def true_step(problem: Problem) -> Truth:
    """The ground truth of one DPO step in float64, without autograd.

    1. Summed log-probs of policy and reference, and the loss.
    2. The derivative of the loss with respect to each sequence's log-prob.
    3. Sequence by sequence, the gradient at the logits, and from it those of hidden states and weight.

    At the target that gradient is p − 1. It is computed as minus the sum of all other probabilities: with p close to 1
    the subtraction would lose most digits.
    """
    weight = problem.weight.detach().double()
    policy = true_logps(problem.hidden, problem.weight, problem.labels)
    margins = policy - true_logps(problem.ref_hidden, problem.ref_weight, problem.labels)
    chosen, rejected = margins.chunk(2)
    gap = problem.beta * (chosen - rejected)
    loss = -torch.nn.functional.logsigmoid(gap).mean()

    slope = -problem.beta * torch.sigmoid(-gap) / len(gap)

    hidden_grad = torch.zeros_like(problem.hidden, dtype=torch.float64)
    weight_grad = torch.zeros_like(weight)
    for number, factor in enumerate(torch.cat([slope, -slope])):
        kept = problem.labels[number] != IGNORE_INDEX
        states, targets = problem.hidden.detach()[number, kept].double(), problem.labels[number, kept].unsqueeze(1)
        z = states @ weight.t()

        # 1 − p at the target, as exp(lse of all others − lse of all)
        probs = z.softmax(-1).scatter_(1, targets, 0)
        others = torch.logsumexp(z.scatter(1, targets, -torch.inf), -1) - torch.logsumexp(z, -1)
        grad = -factor * probs.scatter_(1, targets, -others.exp().unsqueeze(1))

        hidden_grad[number, kept] = grad @ weight
        weight_grad += grad.t() @ states

    return Truth(loss, policy, hidden_grad, weight_grad)


def true_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed log-probs [2B] in float64, one sequence at a time."""
    sums = []
    for states, targets in zip(hidden.detach(), labels, strict=True):
        kept = targets != IGNORE_INDEX
        z = states[kept].double() @ weight.detach().double().t()
        sums.append(z.log_softmax(-1).gather(1, targets[kept].unsqueeze(1)).sum())
    return torch.stack(sums)
