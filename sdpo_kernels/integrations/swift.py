"""ms-swift's preference trainers without logits: DPO, KTO, CPO, SimPO and ORPO.

    # fused_head.py
    from sdpo_kernels.integrations.swift import patch

    patch()

    swift rlhf --rlhf_type dpo --external_plugins fused_head.py …

A trainer's models get the fused head when the trainer is created, before accelerate wraps them. DPO and KTO run their
own forward on a stand-in for the model: calling it scores the labels, and what it returns as `logits` are the scores,
which `get_per_token_logps` passes on. CPO, SimPO and ORPO take their five results from these scores.

What differs from ms-swift:

- `use_logits_to_keep` has no effect: only scored rows reach the head anyway.
- bfloat16 log-probs are exact to float32.
- A labelled first token of a sequence is not scored, since nothing predicts it; ms-swift takes it for the token after
  the last one.
- `logits/chosen` and `logits/rejected` of CPO, SimPO and ORPO are means over the scored tokens; ms-swift's are over all
  positions, prompt and padding included. DPO's and KTO's are the same.

Left to ms-swift's own way, with a warning that names the reason: encoder-decoder and multimodal models, sequence
parallelism, Liger, unsloth, DeepSpeed ZeRO-3, several devices for one model, tuners that are neither full nor PEFT's, a
head that is not one linear layer, and trainers created before `patch()`. Its other trainers (GRPO, GKD, PPO, reward,
SFT) are not touched.

Written from ms-swift 4.6.0 with trl 0.29: swift/rlhf_trainers/rlhf_mixin.py, dpo_trainer.py and kto_trainer.py; trl's
experimental/cpo/cpo_trainer.py and experimental/orpo/orpo_trainer.py.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from sdpo_kernels.integrations.causal_lm import attach_fused_head, detach_fused_head, is_attached
from sdpo_kernels.integrations.head_settings import checked_settings
from sdpo_kernels.integrations.lm_head import find_head, unwrap
from sdpo_kernels.integrations.method_patch import MethodPatch, undo
from sdpo_kernels.integrations.router_loss import find_router_loss
from sdpo_kernels.integrations.token_logps import token_logps
from sdpo_kernels.rows import IGNORE_INDEX

logger = logging.getLogger(__name__)

__all__ = ["patch", "unpatch"]

TRIED = ("4.6.0",)
PREFIXES = ("", "completion_", "KL_completion_")  # of a batch's keys: DPO's; KTO's two
AVERAGED = ("ipo", "simpo")  # CPO's losses of the mean log-prob instead of the sum
INIT = ("self", "model", "ref_model", "_args", "kwargs")
LOGPS = ("self", "logits", "labels", "label_pad_token_id", "reduction")
FORWARD = ("self", "model", "batch")


def patch(
    *,
    backend: str = "auto",
    stash_bytes: int | str = "auto",
    grad_tol: float = 0.0,
    grad_tol_relative: bool = False,
) -> MethodPatch:
    """Let ms-swift's DPO, KTO, CPO and ORPO trainers score tokens without logits, until `unpatch()`.

    Call it before trainers are created; a second call replaces the first one's settings, for trainers created later.
    Logs once what was replaced (level INFO). As a context manager the result undoes it at the end of the block.

    Args:
        backend, stash_bytes, grad_tol, grad_tol_relative: as in `linear_logps`.

    Raises:
        ImportError: ms-swift is not installed.
        RuntimeError: a version whose methods take other parameters; nothing stays replaced. Versions other than 4.6.0
            with the same parameters are patched, with a warning in the log.
        ValueError: an unknown backend, stash_bytes that is neither "auto" nor at least 0, or a grad_tol outside [0, 1).
    """
    settings = checked_settings(backend, stash_bytes, grad_tol, grad_tol_relative)
    adapter = MethodPatch("ms-swift", TRIED, logging.getLogger("swift"))
    mixin, dpo = _class("rlhf_mixin", "RLHFTrainerMixin"), _class("dpo_trainer", "DPOTrainer")
    kto, cpo = _class("kto_trainer", "KTOTrainer"), _class("cpo_trainer", "CPOTrainer")
    orpo = _class("orpo_trainer", "ORPOTrainer")

    def wrap(owner: Any, name: str, parameters: Sequence[str], wrapper: Callable[..., Any], *settings: Any) -> None:
        adapter.replace(owner, name, parameters, wrapper(getattr(owner, name, None), *settings))

    attach = partial(attach_fused_head, **settings)
    wrap(mixin, "__init__", INIT, _attaching, (dpo, kto, cpo, orpo), attach)
    wrap(mixin, "get_per_token_logps", LOGPS, _passing_scores)
    wrap(dpo, "concatenated_forward", (*FORWARD, "is_ref_model"), _on_stand_in)
    wrap(kto, "forward", FORWARD, _on_stand_in)
    wrap(cpo, "concatenated_forward", FORWARD, _pairs)
    wrap(orpo, "concatenated_forward", FORWARD, _pairs)
    adapter.activate()
    return adapter


def unpatch() -> None:
    """Put ms-swift's own methods back; does nothing if it is not patched.

    Models of trainers created in the meantime keep their fused head, which does nothing without `logp_targets`.
    """
    undo("ms-swift")


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"swift.rlhf_trainers.{module}"), name)


class _Scores(NamedTuple):
    """What a trainer takes for its logits."""

    logps: Tensor  # [B, T], at the position that predicts; as all three
    mean_logits: Tensor
    mask: Tensor
    vocab: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, T, V], of the logits that they stand for."""
        return (*self.logps.shape, self.vocab)


class _StandIn:
    """A trainer's model during its forward: a call scores the batch's labels, everything else is the model's own."""

    def __init__(self, model: nn.Module, batch: dict[str, Any]) -> None:
        self._model, self._batch = model, batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *, input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any) -> SimpleNamespace:
        """Scores and the router's auxiliary loss, under the names of a transformers model's output."""
        # KTO calls the model for two sets of sequences in one batch
        prefixes = [prefix for prefix in PREFIXES if self._batch.get(f"{prefix}input_ids") is input_ids]
        if not prefixes:
            raise RuntimeError("ms-swift: called its model with other input_ids, must be those of the batch")
        labels = self._batch[f"{prefixes[0]}labels"]

        # packed sequences follow each other in one row, and nothing predicts the first token of any
        if position_ids is not None:
            labels = labels.masked_fill(position_ids == 0, IGNORE_INDEX)

        # the reference asks for the mean logits too, to be scored by the same kernel as the policy
        logps, mask, extras = token_logps(
            self._model, labels, outputs=("mean_logits",), input_ids=input_ids, position_ids=position_ids, **inputs
        )
        vocab = unwrap(self._model).get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        return SimpleNamespace(
            logits=_Scores(logps, extras["mean_logits"], mask, vocab), aux_loss=extras.get("aux_loss")
        )


def _attaching(original: Callable[..., None], served: tuple[type, ...], attach: Callable[..., Any]) -> Any:
    """A constructor that attaches the fused head to the models first, or warns why not."""

    def __init__(self: Any, model: Any = None, ref_model: Any = None, *_args: Any, **kwargs: Any) -> None:
        if isinstance(self, served):
            models = [each for each in (model, ref_model) if each is not None]
            reason = _why_not(kwargs["args"], kwargs["template"], models)
            for each in models if reason is None else ():
                if is_attached(each):  # by an earlier trainer, perhaps with other settings
                    detach_fused_head(each)
                attach(each)
            _leave(self, reason)
        original(self, model, ref_model, *_args, **kwargs)

    return __init__


def _passing_scores(original: Callable[..., Any]) -> Any:
    def get_per_token_logps(
        self: Any, logits: Any, labels: Tensor, label_pad_token_id: int = IGNORE_INDEX, reduction: str = "mean"
    ) -> Any:
        if not isinstance(logits, _Scores):
            return original(self, logits, labels, label_pad_token_id, reduction)
        means = logits.mean_logits
        return logits.logps, means * logits.vocab if reduction == "sum" else means, logits.mask

    return get_per_token_logps


def _on_stand_in(original: Callable[..., Any]) -> Any:
    """DPO's and KTO's own forward, on a stand-in for the model."""

    def forward(self: Any, model: nn.Module, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not _is_served(self, model):
            return original(self, model, batch, *args, **kwargs)
        with _all_positions(self.args):
            return original(self, _StandIn(model, batch), batch, *args, **kwargs)

    return forward


def _pairs(original: Callable[..., Any]) -> Any:
    """The forward of CPO, SimPO and ORPO: log-probs, mean logits, the chosen answers' loss, and the router's."""

    def concatenated_forward(self: Any, model: nn.Module, batch: dict[str, Any]) -> Any:
        if not _is_served(self, model):
            return original(self, model, batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        found = _StandIn(model, batch)(**inputs)

        # TRL's ORPO has no cpo_alpha: it always averages, and always adds the chosen answers' cross-entropy
        sums, counts = found.logits.logps.sum(-1), found.logits.mask.sum(-1)
        is_orpo = not hasattr(self, "cpo_alpha")
        logps = sums / counts if is_orpo or self.loss_type in AVERAGED else sums
        half = len(sums) // 2
        nll = -sums[:half].sum() / counts[:half].sum() if is_orpo or self.cpo_alpha != 0 else sums.new_zeros(())

        means, mask = found.logits.mean_logits, found.logits.mask
        results = (logps[:half], logps[half:], means[:half][mask[:half]], means[half:][mask[half:]], nll)
        return (*results, found.aux_loss) if self.aux_loss_enabled else results

    return concatenated_forward


@contextmanager
def _all_positions(args: Any) -> Iterator[None]:
    """Keep the whole batch: ms-swift would cut positions and labels, only to save logits."""
    asked, args.use_logits_to_keep = args.use_logits_to_keep, False
    try:
        yield
    finally:
        args.use_logits_to_keep = asked


def _why_not(args: Any, template: Any, models: list[Any]) -> str | None:
    """Why a trainer has to build logits, or None."""
    model = models[0]
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    for reason, applies in {
        "an encoder-decoder model": template.is_encoder_decoder,
        "a multimodal model": model.model_meta.is_multimodal,
        "sequence_parallel_size above 1": template.sequence_parallel_size > 1,
        "use_liger_kernel, which replaces the model's forward": args.use_liger_kernel,
        "tuner_backend unsloth, which replaces the model's forward": args.tuner_backend == "unsloth",
        "DeepSpeed ZeRO-3, which partitions the head (ZeRO-2 does not)": is_deepspeed_zero3_enabled(),
        "a model on several devices": len(devices) > 1,
    }.items():
        if applies:
            return reason

    router = True if model.model_info.is_moe_model and args.router_aux_loss_coef > 0 else None
    for base in map(unwrap, models):
        if not isinstance(base, PreTrainedModel):
            return f"a {type(base).__name__} around the model, where only PEFT's tuners are known"
        try:
            find_head(base)
            find_router_loss(base, router)
        except ValueError as error:
            return str(error)
    return None


def _is_served(trainer: Any, model: nn.Module) -> bool:
    """Whether the trainer was created with a fused head, and `model` still has it."""
    if not hasattr(trainer, "_sdpo_leaves"):
        _leave(trainer, "it was created before patch()")
    elif not trainer._sdpo_leaves and not is_attached(model):
        _leave(trainer, f"its model was wrapped in a {type(model).__name__}, in which the fused head cannot be found")
    return not trainer._sdpo_leaves


def _leave(trainer: Any, reason: str | None) -> None:
    """Note whether the trainer is left to its own way, and warn why."""
    trainer._sdpo_leaves = reason is not None
    if reason is not None:
        logger.warning("ms-swift's %s builds logits as without patch(): %s", type(trainer).__name__, reason)
