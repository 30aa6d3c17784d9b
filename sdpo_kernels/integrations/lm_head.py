"""Find the head of a Hugging Face causal language model: its body, its weight, and its logit transform.

    head = find_head(model)
    hidden = head.hidden(input_ids=..., position_ids=..., use_cache=False)   # [B, T, H]
    operands = head.operands(hidden.flatten(0, -2))                          # arguments of linear_logps

PEFT adapters on the head are supported: LoRA, and a head named in `modules_to_save`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
DIVISORS = ("logits_scaling",)  # Granite
THROUGH_ROOT = "_sdpo_through_root"  # on a body that must be called in a forward of the model (cut_weights.py)
LORA_MULTIPLE = 8  # of columns: what CUDA's tensor descriptors and matrix products read at once
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM


class Operands(NamedTuple):
    """Arguments of linear_logps."""

    hidden: Tensor  # [N, H], with lora_b [N, H + r]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_b: Tensor | None  # [V, r]


@dataclass(frozen=True)
class LMHead:
    """z = softcap·tanh(logit_scale·(hidden·weightᵀ + bias)/softcap), of the hidden states that `body` returns."""

    body: nn.Module  # returns last_hidden_state
    module: Any  # nn.Module: the model's output embedding, including PEFT's wrapper
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def width(self) -> int:
        """H."""
        return self._base().weight.shape[1]

    @property
    def is_cut(self) -> bool:
        """Whether its weight is a DTensor: sharded by FSDP2, which has not gathered it, or tensor-parallel."""
        return hasattr(self._base().weight, "device_mesh")

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether its ranks work on the same rows: its weight's device mesh is the one that transformers calls tp."""
        mesh = getattr(self._base().weight, "device_mesh", None)
        return mesh is not None and mesh.mesh_dim_names == ("tp",)

    @property
    def is_partitioned(self) -> bool:
        """Whether DeepSpeed ZeRO-3 has divided its weight between ranks, and gathers it for its module's forward."""
        return hasattr(getattr(self._base(), "weight", None), "ds_shape")

    @property
    def linear(self) -> nn.Module:
        """The module that holds the [V, H] weight, inside PEFT's wrapper if there is one."""
        return self._base()

    def hidden(self, **inputs: Any) -> Tensor:
        """Hidden states [B, T, H] of the body, after its last norm."""
        return hidden_of(getattr(self.body, THROUGH_ROOT, self.body)(**inputs))

    def weight(self) -> Tensor:
        """[V, H]; with LoRA on the head, base weight + deltas in the wider of their dtypes; differentiable."""
        weight = self._base().weight
        for name in self._lora_names():
            weight = weight + self.module.get_delta_weight(name)
        return weight

    def bias(self) -> Tensor | None:
        """[V] or None; differentiable."""
        bias = self._base().bias if hasattr(self._base(), "bias") else None
        for name in self._lora_names():
            extra = self.module.lora_B[name].bias
            if extra is not None:
                extra = extra * self.module.scaling[name]
                bias = extra if bias is None else bias + extra
        return bias

    def operands(self, hidden: Tensor) -> Operands:
        """What linear_logps needs for the same logits as those of `hidden` [N, H] and the head.

        A LoRA of rank r is r more columns, [x, s·A·x]·[W, B]ᵀ, instead of W + s·B·A: a delta below half an ulp of a
        bfloat16 weight would be lost in the sum. Nor is the [V, H] delta ever built. Zeros fill r up to a multiple of
        LORA_MULTIPLE. Of a tensor-parallel head the whole weight is gathered, on all its ranks, which have the same
        rows.
        """
        base, bias = self._base(), self.bias()
        if self.is_tensor_parallel:
            whole: Any = bias
            return Operands(hidden, base.weight.full_tensor(), None if whole is None else whole.full_tensor(), None)

        # in the dtypes of PEFT's own forward: features in the adapter's, then rounded to hidden's
        rows, columns = [hidden], []
        for name in self._lora_names():
            lora_a, lora_b = self.module.lora_A[name], self.module.lora_B[name]
            features = lora_a(hidden.to(lora_a.weight.dtype)) * self.module.scaling[name]
            rows.append(features.to(hidden.dtype))
            columns.append(lora_b.weight.to(base.weight.dtype))
        if not columns:
            return Operands(hidden, base.weight, bias, None)

        missing = self.lora_columns - sum(b.shape[1] for b in columns)
        rows.append(hidden.new_zeros(hidden.shape[0], missing))
        columns.append(base.weight.new_zeros(base.weight.shape[0], missing))
        bias = None if bias is None else bias.to(base.weight.dtype)
        return Operands(torch.cat(rows, 1), base.weight, bias, torch.cat(columns, 1))

    @property
    def lora_columns(self) -> int:
        """r of `operands`, filled up; 0 without a LoRA."""
        ranks = sum(self.module.lora_B[name].weight.shape[1] for name in self._lora_names())
        return -(-ranks // LORA_MULTIPLE) * LORA_MULTIPLE

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of everything trainable in the head."""
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _base(self) -> Any:
        """The module that holds the [V, H] weight."""
        module = self.module
        if hasattr(module, "modules_to_save"):
            active = [] if module.disable_adapters else module.active_adapters
            module = module.modules_to_save[active[0]] if active else module.original_module
        elif hasattr(module, "lora_A"):
            if module.disable_adapters and module.merged:
                module.unmerge()  # as PEFT's own forward does
            module = module.get_base_layer()
        return module

    def _lora_names(self) -> list[str]:
        """Active LoRA adapters of the head that are not merged into its weight."""
        module = self.module
        if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
            return []

        # operands() computes plain LoRA without dropout only
        names = [name for name in module.active_adapters if name in module.lora_A]
        for name in names:
            dropout = module.lora_dropout[name]
            if module.lora_variant.get(name) is not None:
                kind = type(module.lora_variant[name]).__name__
                raise ValueError(f"lora: adapter {name!r} on the head was a {kind}, must be plain LoRA there")
            if module.training and getattr(dropout, "p", 0.0) > 0:
                raise ValueError(f"lora_dropout: was {dropout.p} on the head, must be 0 (call disable_dropout)")
        return names


def hidden_of(out: Any) -> Tensor:
    """Hidden states [B, T, H] in what a body returns."""
    return out[0] if isinstance(out, tuple) else out.last_hidden_state


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile, DDP, DeepSpeed and PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
            model = model.module  # type: ignore[assignment]
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def find_head(model: nn.Module) -> LMHead:
    """The head of a causal language model, wrapped by PEFT or not.

    Raises:
        ValueError: no body, no head, or a head that is not one linear layer with an ordinary weight. One that ZeRO-3
            has partitioned must be in a DeepSpeed engine, whose hooks gather it.
    """
    model = unwrap(model)
    name = type(model).__name__
    get_head = getattr(model, "get_output_embeddings", None)
    module = get_head() if get_head is not None else None
    body = getattr(model, "base_model", model)
    if body is model:  # base_model_prefix does not name an attribute of the class (Llama 4's text model)
        body = getattr(model, "model", model)
    if module is None or body is model:
        raise ValueError(f"model: was a {name}, must be a causal language model with a body and an output embedding")

    head = LMHead(body, module, *_transform(model.config))
    _check_weight(head)
    return head


def _check_weight(head: LMHead) -> None:
    wrapper, kind = head.module, type(head.module).__name__
    known = hasattr(wrapper, "lora_A") or hasattr(wrapper, "modules_to_save")
    if not known and (hasattr(wrapper, "base_layer") or hasattr(wrapper, "original_module")):
        raise ValueError(f"model: its head was a PEFT {kind}, must be plain, LoRA or in modules_to_save")
    weight = getattr(head._base(), "weight", None)
    if head.is_partitioned and hasattr(head.linear, "ds_id"):  # of DeepSpeed's hooks on the module
        if hasattr(wrapper, "lora_A"):
            raise ValueError(
                "model: its head has a LoRA of its own, which DeepSpeed ZeRO-3 would not gather; use ZeRO-2"
            )
        return
    if isinstance(weight, Tensor) and weight.shape == (0,):
        raise ValueError(f"model: its head was a {kind} {_why_empty(weight)}")
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        was = "without a weight" if weight is None else f"with a {weight.dtype} weight of shape {list(weight.shape)}"
        raise ValueError(
            f"model: its head was a {kind} {was}, must be one linear layer with a floating-point [V, H] weight"
        )
    if not _is_linear(head._base()):
        raise ValueError(
            f"model: its head was a {type(head._base()).__name__}, which computes logits in its own way, must be an "
            "nn.Linear"
        )


def _is_linear(base: nn.Module) -> bool:
    """Whether it computes nn.Linear's forward: Baichuan's head, for one, normalizes its weight first."""
    return isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward


def _why_empty(weight: Tensor) -> str:
    """What has left a head's weight empty on this rank, and what to do."""
    if hasattr(weight, "ds_shape"):
        return (
            f"whose weight of shape {list(weight.ds_shape)} DeepSpeed ZeRO-3 has partitioned, must be whole: use "
            "ZeRO-2, or FSDP2 (fully_shard), whose sharded head is supported"
        )
    return (
        "with an empty weight, as FSDP1 and other sharding leave it, must be whole: use FSDP2 (fully_shard), whose "
        "sharded head is supported"
    )


def _transform(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap), under the names that model families use in their configs."""
    text = config.get_text_config()
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= _number(text, name, 1.0)
    for name in DIVISORS:
        scale /= _number(text, name, 1.0)

    # MiniCPM's own code divides the hidden states; transformers' MiniCPM3 has logits_scaling for it
    if getattr(text, "dim_model_base", None) and not hasattr(text, "logits_scaling"):
        scale *= _number(text, "dim_model_base", 1.0) / text.hidden_size

    softcaps = [_number(text, name, 0.0) for name in SOFTCAPS]
    softcap = max(softcaps)
    return scale, softcap if softcap > 0 else None


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    if value is None:
        return default
    if not isinstance(value, (int, float)):
        raise ValueError(f"config.{name}: was {value!r}, must be a number")
    return float(value)
