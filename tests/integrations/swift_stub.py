"""A stub of ms-swift's preference trainers: its classes, signatures and the order of its calls, logits included.

Only what an adapter can meet is here; the sums are written anew. `install(monkeypatch)` puts it into sys.modules.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from sdpo_kernels.integrations import method_patch


class SwiftMixin:
    def __init__(self, model, args, template, train_dataset=None, **kwargs):
        self.model, self.args, self.template = model, args, template

    def get_use_logits_to_keep(self, default_value=True):
        asked = self.args.use_logits_to_keep
        return default_value if asked is None else asked

    def prepare_logits_to_keep(self, inputs):
        labels = inputs["labels"]
        if len(labels) == 1:
            mask = (labels != -100)[0]
            inputs["labels"] = F.pad(labels[:, mask], (1, 0), value=-100)
            inputs["logits_to_keep"] = F.pad(mask[1:], (0, 1), value=True)
        else:
            keep = labels.shape[-1] - int((labels != -100).int().argmax(-1).min()) + 1
            inputs["labels"], inputs["logits_to_keep"] = labels[:, -keep:], keep


class RLHFTrainerMixin:
    def __init__(self, model=None, ref_model=None, *_args, **kwargs):
        self.ref_model = ref_model
        args = kwargs["args"]
        self.is_encoder_decoder = kwargs["template"].is_encoder_decoder
        self.label_pad_token_id = -100
        super().__init__(model, *_args, **kwargs)
        self.aux_loss_enabled = model.model_info.is_moe_model and args.router_aux_loss_coef > 0

    def concatenated_forward(self, model, batch):
        inputs = batch.copy()
        labels = inputs.pop("labels")
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, use_cache=False)
        return self.results(outputs, labels, batch.get("attention_mask"))

    def get_per_token_logps(self, logits, labels, label_pad_token_id=-100, reduction="mean"):
        if logits.shape[:-1] != labels.shape:
            raise ValueError("Logits and labels must have the same shape")
        mask = labels != label_pad_token_id
        reduced = logits.mean(-1) if reduction == "mean" else logits.sum(-1)
        return token_logps(logits, labels) * mask, reduced * mask, mask


class DPOTrainer(RLHFTrainerMixin, SwiftMixin):
    def __init__(self, model=None, ref_model=None, *_args, **kwargs):
        super().__init__(model, ref_model, *_args, **kwargs)

    def concatenated_forward(self, model, batch, is_ref_model=False):
        batch = batch.copy()
        if self.get_use_logits_to_keep(self.template.sequence_parallel_size == 1):
            self.prepare_logits_to_keep(batch)
        if self.aux_loss_enabled:
            batch["output_router_logits"] = True
        labels = batch.pop("labels", None)
        positions = batch.pop("text_position_ids", None)
        positions = batch.get("position_ids") if positions is None else positions
        outputs = model(**batch, use_cache=False)
        all_logits = outputs.logits
        if all_logits.shape[1] != labels.shape[1]:
            all_logits = all_logits[:, -labels.shape[1] :]
        labels = torch.roll(labels, shifts=-1, dims=1)
        logps, means, mask = self.get_per_token_logps(all_logits, labels, label_pad_token_id=self.label_pad_token_id)

        if self.template.padding_free:
            kept = batch.get("logits_to_keep")
            owner = (positions[0] == 0).cumsum(0) - 1
            owner = owner[kept] if isinstance(kept, torch.Tensor) else owner
            sums = logps.new_zeros(int(owner.max()) + 1).index_add(0, owner, logps[0])
            half, chosen = len(sums) // 2, owner < (owner.max() + 1) // 2
            parts = [(logps[0][side & mask[0]], means[0][side & mask[0]]) for side in (chosen, ~chosen)]
        else:
            sums, half = logps.sum(-1), len(labels) // 2
            parts = [(logps[side][mask[side]], means[side][mask[side]]) for side in (slice(half), slice(half, None))]
            if self.args.ld_alpha is not None and not is_ref_model:
                shared = mask.sum(1).view(2, -1).amin(0).repeat(2)
                beyond = mask.cumsum(1) > shared[:, None]
                sums = (logps * torch.where(beyond, self.args.ld_alpha, 1.0)).sum(-1)

        output = {"chosen_logps": sums[:half], "rejected_logps": sums[half:]}
        if not is_ref_model:
            output["nll_loss"] = -parts[0][0].mean()
        output |= {"mean_chosen_logits": parts[0][1].mean(), "mean_rejected_logits": parts[1][1].mean()}
        return output | ({"aux_loss": outputs.aux_loss} if self.aux_loss_enabled else {})


class KTOTrainer(RLHFTrainerMixin, SwiftMixin):
    def __init__(self, model=None, ref_model=None, *_args, **kwargs):
        super().__init__(model, ref_model, *_args, **kwargs)

    def forward(self, model, batch):
        inputs, labels = self.inputs_of(batch, "KL_completion_")
        with torch.no_grad(), disable_gradient_checkpointing(model):
            kl_logits = model(**inputs).logits
        kl_logps, _ = self.get_batch_logps(kl_logits, labels)

        inputs, labels = self.inputs_of(batch, "completion_")
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs)
        logps, logits = self.get_batch_logps(outputs.logits, labels)
        wanted = torch.tensor(batch["label"])
        found = (logps[wanted], logps[~wanted], logits[wanted], logits[~wanted], kl_logps)
        return (*found, outputs.aux_loss) if self.aux_loss_enabled else found

    def inputs_of(self, batch, prefix):
        inputs = {name[len(prefix) :]: value for name, value in batch.items() if name.startswith(prefix)}
        if self.get_use_logits_to_keep(self.template.sequence_parallel_size == 1):
            self.prepare_logits_to_keep(inputs)
        return inputs, inputs.pop("labels")

    def get_batch_logps(self, logits, labels):
        if logits.shape[1] != labels.shape[1]:
            logits = logits[:, -labels.shape[1] :]
        labels = torch.roll(labels, shifts=-1, dims=1)
        logps, sums, _ = self.get_per_token_logps(logits, labels, label_pad_token_id=-100, reduction="sum")
        return logps.sum(-1), sums.sum(-1)


class CPOTrainer(RLHFTrainerMixin, SwiftMixin):
    def __init__(self, model=None, *_args, **kwargs):
        self.loss_type, self.cpo_alpha = kwargs["args"].loss_type, kwargs["args"].cpo_alpha
        super().__init__(model, *_args, **kwargs)

    def results(self, outputs, labels, attention_mask):
        averaged = self.loss_type in ("ipo", "simpo")
        return pair_results(self, outputs, labels, averaged, self.cpo_alpha != 0)


class ORPOTrainer(RLHFTrainerMixin, SwiftMixin):
    def __init__(self, model=None, *_args, **kwargs):
        super().__init__(model, *_args, **kwargs)

    def results(self, outputs, labels, attention_mask):
        return pair_results(self, outputs, torch.where(attention_mask == 1, labels, -100), True, True)


class RewardTrainer(RLHFTrainerMixin, SwiftMixin):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


def pair_results(trainer, outputs, labels, averaged, with_nll):
    """TRL's: shifted by slices, means of logits left to the caller."""
    logits, half, targets = outputs.logits, len(labels) // 2, labels[:, 1:]
    nll = F.cross_entropy(logits[:half, :-1].flatten(0, 1), targets[:half].flatten()) if with_nll else torch.zeros(())
    mask = targets != -100
    logps = (token_logps(logits[:, :-1], targets) * mask).sum(-1)
    logps = logps / mask.sum(-1) if averaged else logps
    found = (logps[:half], logps[half:], logits[:half], logits[half:], nll)
    return (*found, outputs.aux_loss) if trainer.aux_loss_enabled else found


def token_logps(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


@contextmanager
def disable_gradient_checkpointing(model):
    was = getattr(model, "is_gradient_checkpointing", False)
    if was:
        model.gradient_checkpointing_disable()
    yield
    if was:
        model.gradient_checkpointing_enable()


CLASSES = {
    "rlhf_mixin": RLHFTrainerMixin, "dpo_trainer": DPOTrainer, "kto_trainer": KTOTrainer, "cpo_trainer": CPOTrainer,
    "orpo_trainer": ORPOTrainer,
}  # fmt: skip


def install(monkeypatch, version="4.6.0"):
    """Put the stub's modules, and the version of its distribution, where ms-swift's would be."""
    for name in ("swift", "swift.rlhf_trainers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, held in CLASSES.items():
        module: Any = ModuleType(f"swift.rlhf_trainers.{name}")
        setattr(module, held.__name__, held)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    versions = method_patch.metadata.version
    known = lambda name: version if name == "ms-swift" else versions(name)  # noqa: E731
    monkeypatch.setattr(method_patch.metadata, "version", known)


def create(trainer, model, ref_model=None, *, template=(), moe=False, multimodal=False, **args):
    """A trainer of the stub; `template` and `args` over ms-swift's defaults."""
    for each in (model, ref_model):
        if each is not None:
            each.model_meta = SimpleNamespace(is_multimodal=multimodal)
            each.model_info = SimpleNamespace(is_moe_model=moe)
    defaults = {"is_encoder_decoder": False, "sequence_parallel_size": 1, "padding_free": False}
    settings = {
        "use_logits_to_keep": None, "router_aux_loss_coef": 0.1 if moe else 0.0, "ld_alpha": None,
        "use_liger_kernel": False, "tuner_backend": "peft", "loss_type": "sigmoid", "cpo_alpha": 1.0,
    }  # fmt: skip
    given = {"args": SimpleNamespace(**settings | args), "template": SimpleNamespace(**defaults | dict(template))}
    models = (model,) if ref_model is None else (model, ref_model)
    return trainer(*models, **given)
