"""The ground truth for the kernels: three lines of float64 log_softmax, and how errors are judged.

    case = Case(hidden, weight, targets, softcap=30.0)
    check(case, case.ours())

`plain` is the obvious torch code at the same precision as ours (operands as given, logits in float32, gradients
rounded once to the dtype of their tensor). Our error may be a small multiple of its error; no constant is made up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdpo_kernels import linear_logps
from sdpo_kernels.backends import BACKENDS, eager
from sdpo_kernels.backends.base import Request
from sdpo_kernels.head import Head
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows

Found = dict[str, Tensor | None]


def logits_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The transformed logits z, in the inputs' dtype."""
    z = logit_scale * (hidden @ weight.T if bias is None else hidden @ weight.T + bias)
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def target_logps(z: Tensor, targets: Tensor) -> Tensor:
    """log_softmax at the targets, 0 where they are −100."""
    logps = z.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == IGNORE_INDEX, 0.0, logps)


def extras_of(z: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The four extras of `LinearLogps`, 0 where the target is −100."""
    log_probs = z.log_softmax(-1)
    probs = log_probs.exp()
    at_target = z.gather(-1, targets.clamp(min=0).unsqueeze(-1))
    finite = torch.where(probs == 0, 0.0, log_probs)
    values = {
        "entropy": -(probs * finite).sum(-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": (z <= at_target).all(-1),
    }
    masked = targets == IGNORE_INDEX
    return {name: value.masked_fill(masked, 0) for name, value in values.items()}


@dataclass(repr=False)
class Case:
    """One problem: a head, its options and the incoming gradients."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    grad: Tensor | None = None  # of the log-probs, float64 [N]; None: ones
    grad_entropy: Tensor | None = None
    trains: tuple[str, ...] = ("hidden", "weight", "bias")
    outputs: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)  # further keywords of linear_logps

    def __repr__(self) -> str:
        shape = f"{len(self.targets)} rows, H {self.hidden.shape[1]}, V {self.weight.shape[0]}, {self.hidden.dtype}"
        masked = f"{(self.targets == IGNORE_INDEX).sum()} masked, bias {self.bias is not None}"
        entropy = f"entropy's gradient {self.grad_entropy is not None}"
        return f"Case({shape}, {masked}, {self.head}, {self.trains}, {self.outputs}, {entropy}, {self.settings})"

    @property
    def head(self) -> dict[str, Any]:
        """The head's options as keywords."""
        return {"temperature": self.temperature, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def truth(self) -> Found:
        """Values and gradients in float64."""
        return self._found(self._naive(torch.float64), torch.float64)

    def plain(self) -> Found:
        """The obvious torch code: float32 logits (float64 for float64 inputs)."""
        return self._found(self._naive(product(self.hidden.dtype)))

    def ours(self, function: Callable[..., Any] = linear_logps) -> Found:
        """Values and gradients of `linear_logps`."""

        def run(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
            out = function(
                leaves["hidden"], leaves["weight"], self.targets, bias=leaves.get("bias"), outputs=self.outputs,
                **self.head, **self.settings,
            )  # fmt: skip
            return {name: value for name, value in out._asdict().items() if value is not None}

        return self._found(run)

    def largest_terms(self) -> dict[str, float]:
        """For each gradient the largest product that its sums may contain."""
        steep = abs(self.logit_scale / self.temperature)
        largest = steep * (1.0 if self.grad is None else size(self.grad))
        if self.grad_entropy is not None:
            largest += steep * size(self.grad_entropy) * max(1.0, math.log(self.weight.shape[0]))
        return {
            "d_hidden": largest * size(self.weight), "d_weight": largest * size(self.hidden), "d_bias": largest,
        }  # fmt: skip

    def _naive(self, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        def run(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
            z = logits_of(**{name: leaf.to(dtype) for name, leaf in leaves.items()}, **self.head)
            extras = extras_of(z, self.targets)
            return {"logps": target_logps(z, self.targets)} | {name: extras[name] for name in self.outputs}

        return run

    def _found(self, run: Callable[[dict[str, Tensor]], dict[str, Tensor]], dtype: torch.dtype | None = None) -> Found:
        tensors = {"hidden": self.hidden, "weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        leaves = {name: t.detach().to(dtype or t.dtype, copy=True) for name, t in tensors.items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in self.trains)
        out = run(leaves)
        if any(name in self.trains for name in leaves):
            grad = torch.ones(len(self.targets)) if self.grad is None else self.grad
            total = [(out["logps"], grad.to(out["logps"].dtype))]
            if self.grad_entropy is not None:
                total.append((out["entropy"], self.grad_entropy.to(out["entropy"].dtype)))
            torch.autograd.backward([t for t, _ in total], [g for _, g in total])
        return {name: value.detach() for name, value in out.items()} | {f"d_{n}": t.grad for n, t in leaves.items()}


def skip_unless_served(backend: str, dtype: torch.dtype) -> None:
    """Skip a test of a dtype that `backend` says it does not take."""
    reason = BACKENDS[backend].supports(Request(torch.device("cpu"), dtype, dtype, Head(), ()))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def product(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits of `dtype` operands are held."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def error(found: Tensor, truth: Tensor) -> float:
    """The largest absolute error."""
    return (found.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def size(tensor: Tensor) -> float:
    """The largest absolute value."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def check(case: Case, ours: Found, factor: float = 3.0, slack: float = 4.0) -> None:
    """Our error is at most `factor` × plain torch's, plus `slack` roundings in case plain torch was lucky.

    A rounding is one of the largest number in the sum in question: for log-probs the largest of them or 1, for
    gradients the largest product of a coefficient and an operand.
    """
    plain, truth, terms = case.plain(), case.truth(), case.largest_terms()
    assert ours.keys() == truth.keys()
    for name, right in truth.items():
        mine, theirs = ours[name], plain[name]
        if right is None:
            assert mine is None, f"{name} was not asked for"
            continue
        assert mine.shape == right.shape
        if right.dtype == torch.bool:
            assert torch.equal(mine, theirs), name
            continue
        eps = torch.finfo(mine.dtype).eps
        if name == "d_bias":  # summed from the products' operands, which are rounded to their dtype once
            eps = max(eps, torch.finfo(case.hidden.dtype).eps / 2)
        rounding = eps * (terms[name] if name in terms else max(size(right), 1.0))
        allowed = factor * error(theirs, right) + slack * rounding
        assert error(mine, right) <= allowed, f"{name}: error {error(mine, right):.3e}, allowed {allowed:.3e}"


def random_case(
    n_rows: int,
    width: int,
    n_columns: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    masked: float = 0.0,
    scale: float = 1.0,
    **options: Any,
) -> Case:
    """A case of normal numbers; logits have standard deviation about `scale`, `masked` is the share of −100 targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(n_columns, (n_rows,), generator=generator)
    targets[torch.rand(n_rows, generator=generator) < masked] = IGNORE_INDEX
    return Case(
        hidden=normal(n_rows, width).to(dtype),
        weight=(normal(n_columns, width) * scale / width**0.5).to(dtype),
        targets=targets,
        bias=normal(n_columns).to(dtype) if bias else None,
        grad=normal(n_rows),
        **options,
    )


def scored_rows(targets: Tensor) -> ScoredRows:
    """The scored rows of `targets` [N], as one sequence."""
    return ScoredRows.from_labels(targets.unsqueeze(0))


@contextmanager
def chunk_columns(columns: int) -> Iterator[None]:
    """Make the eager walk use chunks of `columns` columns, so that small shapes have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "CHUNK_ELEMENTS", 1)
        patch.setattr(eager, "CHUNK_MULTIPLE", columns)
        yield


@contextmanager
def allocations(path: Path) -> Iterator[dict[str, int]]:
    """Afterwards: "largest" single allocation and "peak" of all, in bytes, of torch's CPU allocator in this block.

    Exact and repeatable: torch's profiler reports each allocation, also those made inside custom ops.
    """
    found: dict[str, int] = {}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield found
    profile.export_chrome_trace(str(path))
    with open(path) as file:
        events = json.load(file)["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    found["largest"] = max(e["args"]["Bytes"] for e in memory)
    total = peak = 0
    for event in memory:
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    found["peak"] = peak
