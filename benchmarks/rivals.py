"""Every peer behind one signature: `rival(problem)` does the preparation that is not timed and returns a step.

A step does one DPO step's work at the head: log-probs of the reference without gradient, log-probs of the policy, the
loss, and the backward into `problem.hidden.grad` and `problem.weight.grad`; it returns a `Step`. All get the same
tensors. The cases gemms and gemms_fp32 are the bare-GEMM baseline ("floor"), whichever is faster. To add a peer, write
one function and add it to RIVALS; raise `CannotRun` with the reason if it cannot run.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import packed_persistent
from benchmarks.problem import IGNORE_INDEX, CannotRun, Problem, Step
from sdpo_kernels import fused_linear_dpo
from sdpo_kernels.backends import auto_choice
from sdpo_kernels.backends.base import EXTRAS, Request
from sdpo_kernels.backends.triton.persistent import is_installed
from sdpo_kernels.head import Head
from sdpo_kernels.integrations import trl as fused_trl

Rival = Callable[[Problem], Callable[[], Step | None]]


def gemms(problem: Problem) -> Callable[[], None]:
    """The floor: four bare GEMMs on the scored rows (logits of the reference; logits, dX and dW of the policy)."""
    index = (problem.labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
    weight, ref_weight = problem.weight.detach(), problem.ref_weight
    x, ref_x = (t.detach().flatten(0, 1)[index] for t in (problem.hidden, problem.ref_hidden))

    # random: the time of a product does not depend on its values
    grad = torch.randn(index.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)

    def step() -> None:
        torch.mm(ref_x, ref_weight.t())
        torch.mm(x, weight.t())
        torch.mm(grad, weight)
        torch.mm(grad.t(), x)

    return step


def gemms_fp32(problem: Problem) -> Callable[[], None]:
    """The floor on a CPU without bf16 instructions: the same four GEMMs on float32 copies made beforehand."""
    if problem.hidden.device.type != "cpu":
        raise CannotRun("on a GPU the 16-bit products are the faster ones")
    if problem.hidden.dtype == torch.float32:
        raise CannotRun("the same as `gemms`")
    return gemms(problem.cast(torch.float32))


def naive(problem: Problem) -> Callable[[], Step]:
    """Logits of every row in the model's dtype, log_softmax in float32, autograd: as trainers used to do it."""
    return _dpo_step(problem, _naive_logps(problem))


def naive_fp32(problem: Problem) -> Callable[[], Step]:
    """The float32 head that trainers offer: hidden states and weight are cast, then as `naive`."""
    if problem.hidden.dtype == torch.float32:
        raise CannotRun("the same as `naive`")
    logps = _naive_logps(problem)
    return _dpo_step(problem, lambda hidden, weight: logps(hidden.float(), weight.float()))


def naive_compiled(problem: Problem) -> Callable[[], Step]:
    """`torch.compile` of the naive log-probs, with static shapes."""
    return _dpo_step(problem, torch.compile(_naive_logps(problem), dynamic=False))


def linear_cross_entropy(problem: Problem) -> Callable[[], Step]:
    """`F.linear_cross_entropy` of torch ≥ 2.13 with its defaults: reduction "none", all rows, ignore_index."""
    return _torch_step(problem, chunked=False)


def linear_cross_entropy_chunked(problem: Problem) -> Callable[[], Step]:
    """The same with `LinearCrossEntropyOptions()`: chunks of rows, recomputed in the backward."""
    return _torch_step(problem, chunked=True)


def trl_fused(problem: Problem) -> Callable[[], Step]:
    """TRL ≥ 1.15's `ChunkedLogProbFunction` on all rows, as TRL calls it on a CPU; see also `trl_fused_scored`."""
    return _dpo_step(problem, _trl_logps(problem, scored_only=False))


def trl_fused_scored(problem: Problem) -> Callable[[], Step]:
    """The same on the scored rows only, as TRL calls it where Triton runs."""
    return _dpo_step(problem, _trl_logps(problem, scored_only=True))


def trl_fused_metrics(problem: Problem) -> Callable[[], Step]:
    """`trl_fused` with the policy's outputs that TRL's trainers log: entropy, log Σp², mean logit, top-1."""
    return _dpo_step(problem, _trl_logps(problem, scored_only=False, metrics=EXTRAS))


def trl_patched(problem: Problem) -> Callable[[], Step]:
    """`trl_fused` under `integrations.trl.patch()`: what TRL's trainers gain by one line."""
    return _patched_step(problem, ())


def trl_patched_metrics(problem: Problem) -> Callable[[], Step]:
    """`trl_fused_metrics` under `integrations.trl.patch()`."""
    return _patched_step(problem, EXTRAS)


def liger_dpo(problem: Problem) -> Callable[[], Step]:
    """`LigerFusedLinearDPOLoss` with its defaults, which compile its chunk."""
    return _liger_step(problem, compiled=True)


def liger_dpo_eager(problem: Problem) -> Callable[[], Step]:
    """The same with `compiled=False`."""
    return _liger_step(problem, compiled=False)


def liger_scaled(problem: Problem) -> Callable[[], Step]:
    """DPO composed from `LigerFusedLinearScaledCrossEntropyFunction`, the NLL of each token."""
    module = _imported("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction

    def losses(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return function.apply(rows, weight, targets)

    return _nll_step(problem, losses)


def cce(problem: Problem) -> Callable[[], Step]:
    """DPO composed from Apple's cut cross-entropy, without its filter of small gradients, as ours has none."""
    if problem.hidden.device.type != "cuda":
        raise CannotRun("its Triton kernels need CUDA")
    function = _imported("cut_cross_entropy").linear_cross_entropy
    return _nll_step(problem, lambda x, w, y: function(x, w, y, reduction="none", filter_eps=None))


def liger_sm90(problem: Problem) -> Callable[[], Step]:
    """DPO composed from Liger's CuTe kernel for Hopper, the NLL of each token (elsewhere Liger uses torch chunks)."""
    _needs_hopper(problem, "liger-kernel")
    function = _imported("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    return _nll_step(problem, function.LigerFusedScaledCrossEntropySM90Function.apply)


def liger_tp(problem: Problem) -> Callable[[], Step]:
    """DPO composed from Liger's compiled library for Hopper, tensor parallel, in a group of one."""
    _needs_hopper(problem, "liger-cute-kernels")
    module = _imported("liger_kernel.ops.cute.fused_linear_scaled_cross_entropy_tp")
    library = _imported("liger_cute_kernels")
    if not torch.distributed.is_initialized():
        store = f"file://{tempfile.mkdtemp()}/store"
        torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)

    # it allocates its memory once, for the largest call
    size = {"max_tokens": problem.labels.numel(), "hidden_size": problem.hidden.shape[-1]}
    library.configure(flsce=library.FusedLinearCrossEntropyConfig(**size, local_vocab_size=len(problem.weight)))
    function, group = module.LigerFusedLinearScaledCrossEntropyNativeTPFunction, torch.distributed.group.WORLD

    def losses(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return function.apply(rows, weight, targets, 0, 1.0, IGNORE_INDEX, 1, False, group)

    return _nll_step(problem, losses)


def quack(problem: Problem) -> Callable[[], Step]:
    """DPO composed from QuACK's linear cross-entropy of each token.

    Its chunked function returns only the sum over all tokens, so this one is used, which keeps the logits in bf16.
    """
    _needs_hopper(problem, "quack-kernels")
    function = _imported("quack.linear_cross_entropy").linear_cross_entropy_func

    def losses(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return function(rows, weight, None, targets, IGNORE_INDEX, "none", True)

    return _nll_step(problem, losses)


def ours(problem: Problem) -> Callable[[], Step]:
    """`fused_linear_dpo` with its defaults; it finds the scored rows itself."""
    return _our_step(problem, "auto")


def ours_without_stash(problem: Problem) -> Callable[[], Step]:
    """`fused_linear_dpo(stash_bytes=0)`: the backward recomputes every logit."""
    return _our_step(problem, 0)


def ours_eager(problem: Problem) -> Callable[[], Step]:
    """`fused_linear_dpo(backend="eager")`: plain torch, the reference implementation of the compiled backends."""
    return _our_step(problem, "auto", "eager")


def ours_native(problem: Problem) -> Callable[[], Step]:
    """`fused_linear_dpo(backend="native")`: on CUDA the C++/CUDA kernels instead of Triton."""
    if problem.hidden.device.type == "cpu":
        raise CannotRun("on the CPU it is the same as `ours`")
    return _our_step(problem, "auto", "native")


def ours_native_without_stash(problem: Problem) -> Callable[[], Step]:
    """`fused_linear_dpo(backend="native", stash_bytes=0)`."""
    if problem.hidden.device.type == "cpu":
        raise CannotRun("on the CPU it is the same as `ours_without_stash`")
    return _our_step(problem, 0, "native")


def ours_persistent(problem: Problem) -> Callable[[], Step]:
    """`fused_linear_dpo` with `SDPO_QUACK=1`: QuACK's persistent kernel in place of Triton's tiles."""
    _needs_hopper(problem, "quack-kernels")
    if not is_installed():
        if not packed_persistent.is_packed():
            raise CannotRun("neither quack-kernels nor libraries packed by benchmarks/gpu.sh are here")
        packed_persistent.use()
    step = _our_step(problem, "auto")

    def asked() -> Step:
        with mock.patch.dict(os.environ, SDPO_QUACK="1"):
            return step()

    return asked


RIVALS: dict[str, Rival] = {
    "gemms": gemms,
    "gemms_fp32": gemms_fp32,
    "naive": naive,
    "naive_fp32": naive_fp32,
    "naive_compiled": naive_compiled,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy_chunked": linear_cross_entropy_chunked,
    "trl_fused": trl_fused,
    "trl_fused_scored": trl_fused_scored,
    "trl_fused_metrics": trl_fused_metrics,
    "trl_patched": trl_patched,
    "trl_patched_metrics": trl_patched_metrics,
    "liger_dpo": liger_dpo,
    "liger_dpo_eager": liger_dpo_eager,
    "liger_scaled": liger_scaled,
    "liger_sm90": liger_sm90,
    "liger_tp": liger_tp,
    "cce": cce,
    "quack": quack,
    "ours": ours,
    "ours_without_stash": ours_without_stash,
    "ours_eager": ours_eager,
    "ours_native": ours_native,
    "ours_native_without_stash": ours_native_without_stash,
    "ours_persistent": ours_persistent,
}


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


def _naive_logps(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    labels = problem.labels

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        log_probs = (hidden @ weight.t()).float().log_softmax(-1)
        chosen = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (chosen * (labels != IGNORE_INDEX)).sum(-1)

    return logps


def _needs_hopper(problem: Problem, package: str) -> None:
    """Raise CannotRun unless CuTe kernels for compute capability 9.0 and bf16 can run."""
    if problem.hidden.device.type != "cuda":
        raise CannotRun(f"{package}: its CuTe kernels need CUDA")
    found = torch.cuda.get_device_capability(problem.hidden.device)
    if found < (9, 0):
        raise CannotRun(f"{package}: its kernels need a Hopper GPU, this one has compute capability {found}")
    if problem.hidden.dtype != torch.bfloat16:
        raise CannotRun(f"{package}: its kernels are for bfloat16, not {problem.hidden.dtype}")


def _nll_step(problem: Problem, losses: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Step]:
    """A step composed from a function (rows [N, H], weight, targets [N]) → loss of each token, 0 where not scored."""
    targets = problem.labels.reshape(-1)

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return -losses(hidden.flatten(0, 1), weight, targets).view(problem.labels.shape).float().sum(-1)

    return _dpo_step(problem, logps)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotRun(f"{error} (make bench-env installs the rivals)") from error


def _patched_step(problem: Problem, metrics: Sequence[str]) -> Callable[[], Step]:
    _imported("trl.kernels.chunked_logprob")
    try:
        with fused_trl.patch():
            return _dpo_step(problem, _trl_logps(problem, scored_only=False, metrics=metrics))
    except RuntimeError as error:  # an unknown version of TRL
        raise CannotRun(str(error)) from error


def _trl_logps(problem: Problem, scored_only: bool, metrics: Sequence[str] = ()) -> Callable[[Tensor, Tensor], Tensor]:
    apply = _imported("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply

    # everything that depends on the labels only is prepared here and not timed
    targets = problem.labels.reshape(-1)
    scored = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    index = scored if scored_only else torch.arange(len(targets), device=targets.device)
    kept = targets[index].clamp(min=0)
    mask = (targets[index] != IGNORE_INDEX).float()
    sequence = index // problem.labels.shape[1]
    columns = 32768  # the chunk of TRL's trainers

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        rows = rows[index] if scored_only else rows
        outputs = tuple(metrics) if torch.is_grad_enabled() else ()  # TRL requests none of the reference
        found = apply(rows, weight, None, kept, 1.0, columns, None, 1.0, outputs)[0]
        return torch.zeros(len(problem.labels), device=rows.device).index_add(0, sequence, found * mask)

    return logps


def _liger_step(problem: Problem, compiled: bool) -> Callable[[], Step]:
    loss = _imported("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(
        ignore_index=IGNORE_INDEX, beta=problem.beta, compiled=compiled
    )

    def step() -> Step:
        # it returns the loss, and a tuple that starts with the sums of chosen and rejected
        value, found = loss(
            problem.weight, problem.hidden, problem.labels, None, problem.ref_hidden, problem.ref_weight, None
        )
        value.backward()
        return Step(value.detach(), torch.cat([found[0], found[1]]).detach().float())

    return step


def _torch_step(problem: Problem, chunked: bool) -> Callable[[], Step]:
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRun(f"torch {torch.__version__} has no F.linear_cross_entropy (in core since 2.13)")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def losses(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            rows, weight, targets, reduction="none", ignore_index=IGNORE_INDEX, options=options
        )

    return _nll_step(problem, losses)


def _our_step(problem: Problem, stash_bytes: int | str, backend: str = "auto") -> Callable[[], Step]:
    # what "auto" gives is measured under the name of ours: on CUDA plain torch must not pass for it
    if backend == "auto" and problem.hidden.is_cuda:
        dtype = problem.hidden.dtype
        chosen, skipped = auto_choice(Request(problem.hidden.device, dtype, problem.weight.dtype, Head(), ()))
        if chosen.name == "eager":
            raise CannotRun(f"only plain torch serves: {'; '.join(f'{name}: {why}' for name, why in skipped)}")

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
