"""Every peer behind one signature: `rival(problem)` prepares what may be prepared and returns a step.

A step does one DPO step's work at the head: log-probs of the reference without gradient, log-probs of the policy, the
loss, and the backward into `problem.hidden.grad` and `problem.weight.grad`; it returns a `Step`. All are given the same
tensors. To add a peer, write one function and enter it in RIVALS; raise `CannotRun` with the reason where it cannot.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_kernels import fused_linear_dpo

IGNORE_INDEX = -100


class CannotRun(Exception):
    """A peer that cannot run here, and why."""


class Step(NamedTuple):
    """What a step computed, for judging it: the loss and the policy's summed log-probs [2B]."""

    loss: Tensor
    policy_logps: Tensor


@dataclass
class Problem:
    """One batch at the head: chosen half first, policy and reference of one shape."""

    hidden: Tensor  # [2B, T, H], wants a gradient
    weight: Tensor  # [V, H], wants a gradient
    ref_hidden: Tensor  # [2B, T, H]
    ref_weight: Tensor  # [V, H]
    labels: Tensor  # [2B, T] int64, -100 = not scored
    beta: float = 0.1

    @classmethod
    def random(
        cls, pairs: int, length: int, hidden: int, vocab: int, scored: float, dtype: torch.dtype, device: str
    ) -> Problem:
        """Normal hidden states, logits of standard deviation 3; of each sequence one run of `scored`·T positions.

        Time at the head does not depend on the values, but for backwards that skip small gradients; none here does.
        """
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        n_scored = max(1, round(scored * length))
        starts = torch.randint(length - n_scored + 1, (2 * pairs, 1), generator=generator)
        position = torch.arange(length)
        labels = torch.randint(vocab, (2 * pairs, length), generator=generator)
        labels[(position < starts) | (position >= starts + n_scored)] = IGNORE_INDEX
        states, head = normal(2 * pairs, length, hidden), normal(vocab, hidden) * (3 / hidden**0.5)
        ref_states, ref_head = states + 0.1 * normal(*states.shape), head + 0.01 * normal(*head.shape) / hidden**0.5
        return cls(
            states.to(device, dtype).requires_grad_(),
            head.to(device, dtype).requires_grad_(),
            ref_states.to(device, dtype),
            ref_head.to(device, dtype),
            labels.to(device),
        )

    def forget_gradients(self) -> None:
        """Before the next step."""
        self.hidden.grad = self.weight.grad = None


Rival = Callable[[Problem], Callable[[], Step | None]]


def gemms(problem: Problem) -> Callable[[], None]:
    """The floor: the four bare GEMMs on the scored rows (logits of the reference; logits, dX and dW of the policy)."""
    index = (problem.labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
    weight, ref_weight = problem.weight.detach(), problem.ref_weight
    x, ref_x = (t.detach().flatten(0, 1)[index] for t in (problem.hidden, problem.ref_hidden))
    grad = torch.randn(index.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)

    def step() -> None:
        torch.mm(ref_x, ref_weight.t())
        torch.mm(x, weight.t())
        torch.mm(grad, weight)
        torch.mm(grad.t(), x)

    return step


def naive(problem: Problem) -> Callable[[], Step]:
    """Logits of every row in the model's dtype, log_softmax in float32, autograd: what trainers did at first."""

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        log_probs = (hidden @ weight.t()).float().log_softmax(-1)
        chosen = log_probs.gather(-1, problem.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (chosen * (problem.labels != IGNORE_INDEX)).sum(-1)

    return _dpo_step(problem, logps)


def linear_cross_entropy(problem: Problem) -> Callable[[], Step]:
    """`F.linear_cross_entropy` of torch ≥ 2.13 as it comes: reduction "none", all rows, ignore_index."""
    return _dpo_step(problem, _torch_logps(problem, chunked=False))


def linear_cross_entropy_chunked(problem: Problem) -> Callable[[], Step]:
    """The same with `LinearCrossEntropyOptions()`: chunks of rows, recomputed in the backward."""
    return _dpo_step(problem, _torch_logps(problem, chunked=True))


def trl_fused(problem: Problem) -> Callable[[], Step]:
    """TRL ≥ 1.15's `ChunkedLogProbFunction`, fed all rows as TRL does; on the scored rows alone: `trl_fused_scored`."""
    return _dpo_step(problem, _trl_logps(problem, scored_alone=False))


def trl_fused_scored(problem: Problem) -> Callable[[], Step]:
    """The same on compacted rows: what TRL would be with our row compaction."""
    return _dpo_step(problem, _trl_logps(problem, scored_alone=True))


def liger_dpo(problem: Problem) -> Callable[[], Step]:
    """`LigerFusedLinearDPOLoss` as it comes, which compiles its chunk."""
    return _liger_step(problem, compiled=True)


def liger_dpo_eager(problem: Problem) -> Callable[[], Step]:
    """The same with `compiled=False`."""
    return _liger_step(problem, compiled=False)


def cce(problem: Problem) -> Callable[[], Step]:
    """Apple's cut cross-entropy composed to DPO, its filter of small gradients off, as ours has none."""
    if problem.hidden.device.type != "cuda":
        raise CannotRun("its kernels are Triton, for CUDA alone")
    function = _imported("cut_cross_entropy").linear_cross_entropy
    targets = problem.labels.reshape(-1)

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        losses = function(hidden.flatten(0, 1), weight, targets, reduction="none", filter_eps=None)
        return -losses.view(problem.labels.shape).float().sum(-1)

    return _dpo_step(problem, logps)


def ours(problem: Problem) -> Callable[[], Step]:
    """`fused_linear_dpo` as it comes; it finds the scored rows itself."""
    return _our_step(problem, "auto")


def ours_without_stash(problem: Problem) -> Callable[[], Step]:
    """`fused_linear_dpo(stash_bytes=0)`: the backward recomputes every logit."""
    return _our_step(problem, 0)


def ours_eager(problem: Problem) -> Callable[[], Step]:
    """`fused_linear_dpo(backend="eager")`: plain torch, the twin of the compiled backends."""
    return _our_step(problem, "auto", "eager")


def ours_native(problem: Problem) -> Callable[[], Step]:
    """`fused_linear_dpo(backend="native")`: on CUDA the C++/CUDA kernels in place of Triton's."""
    if problem.hidden.device.type == "cpu":
        raise CannotRun("on the CPU it is what `ours` takes")
    return _our_step(problem, "auto", "native")


RIVALS: dict[str, Rival] = {
    "gemms": gemms,
    "naive": naive,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy_chunked": linear_cross_entropy_chunked,
    "trl_fused": trl_fused,
    "trl_fused_scored": trl_fused_scored,
    "liger_dpo": liger_dpo,
    "liger_dpo_eager": liger_dpo_eager,
    "cce": cce,
    "ours": ours,
    "ours_without_stash": ours_without_stash,
    "ours_eager": ours_eager,
    "ours_native": ours_native,
}
FLOOR = "gemms"


def _dpo_step(problem: Problem, logps: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Step]:
    """A step from a function (hidden, weight) → summed log-probs [2B] that autograd can differentiate."""

    def step() -> Step:
        with torch.no_grad():
            ref = logps(problem.ref_hidden, problem.ref_weight)
        policy = logps(problem.hidden, problem.weight)
        chosen, rejected = (policy - ref).chunk(2)
        loss = -F.logsigmoid(problem.beta * (chosen - rejected)).mean()
        loss.backward()
        return Step(loss.detach(), policy.detach())

    return step


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotRun(f"{error} (make bench-env installs the rivals)") from error


def _trl_logps(problem: Problem, scored_alone: bool) -> Callable[[Tensor, Tensor], Tensor]:
    apply = _imported("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply
    targets = problem.labels.reshape(-1)
    scored = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    index = scored if scored_alone else torch.arange(len(targets), device=targets.device)
    kept = targets[index].clamp(min=0)
    mask = (targets[index] != IGNORE_INDEX).float()
    sequence = index // problem.labels.shape[1]
    columns = 32768  # its trainers' chunk

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        rows = rows[index] if scored_alone else rows
        found = apply(rows, weight, None, kept, 1.0, columns, None, 1.0, ())[0]
        return torch.zeros(len(problem.labels), device=rows.device).index_add(0, sequence, found * mask)

    return logps


def _liger_step(problem: Problem, compiled: bool) -> Callable[[], Step]:
    loss = _imported("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(
        ignore_index=IGNORE_INDEX, beta=problem.beta, compiled=compiled
    )

    def step() -> Step:
        # its first answers: the loss, then the chosen and the rejected sums
        value, found = loss(
            problem.weight, problem.hidden, problem.labels, None, problem.ref_hidden, problem.ref_weight, None
        )
        value.backward()
        return Step(value.detach(), torch.cat([found[0], found[1]]).detach().float())

    return step


def _torch_logps(problem: Problem, chunked: bool) -> Callable[[Tensor, Tensor], Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRun(f"torch {torch.__version__} has no F.linear_cross_entropy (in core since 2.13)")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    targets = problem.labels.reshape(-1)

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        losses = F.linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets, reduction="none", ignore_index=IGNORE_INDEX, options=options
        )
        return -losses.view(problem.labels.shape).float().sum(-1)

    return logps


def _our_step(problem: Problem, stash_bytes: int | str, backend: str = "auto") -> Callable[[], Step]:
    def step() -> Step:
        out = fused_linear_dpo(
            problem.hidden,
            problem.weight,
            problem.labels,
            ref_hidden=problem.ref_hidden,
            ref_weight=problem.ref_weight,
            beta=problem.beta,
            stash_bytes=stash_bytes,
            backend=backend,
        )
        out.loss.backward()
        return Step(out.loss.detach(), torch.cat([out.chosen_logps, out.rejected_logps]))

    return step


def true_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The summed log-probs [2B] in float64, sequence by sequence."""
    sums = []
    for states, targets in zip(hidden.detach(), labels, strict=True):
        kept = targets != IGNORE_INDEX
        z = states[kept].double() @ weight.detach().double().t()
        sums.append(z.log_softmax(-1).gather(1, targets[kept].unsqueeze(1)).sum())
    return torch.stack(sums)
