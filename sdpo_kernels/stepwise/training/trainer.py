"""One stage's `transformers.Trainer`: the fused loss on pairs, TRL's metric names, atomic checkpoints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from sdpo_kernels.dpo_output import DPOOutput, pair_output
from sdpo_kernels.integrations.cut_weights import is_cut
from sdpo_kernels.integrations.router_loss import router_coefficient
from sdpo_kernels.losses import LossSum, PairLogps
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.batches import Batch
from sdpo_kernels.stepwise.data.rank_batches import share_batches
from sdpo_kernels.stepwise.data.schedule import Schedule
from sdpo_kernels.stepwise.models.sharded import not_finite
from sdpo_kernels.stepwise.references.ema import EmaReference
from sdpo_kernels.stepwise.training.checkpoints import AtomicCheckpoints, is_complete
from sdpo_kernels.stepwise.training.sharded_models import ShardedModels
from sdpo_kernels.stepwise.training.start_guard import StartGuard

PENDING = "pending_metrics.safetensors"  # in a checkpoint: the metrics collected since the last log


class StageTrainer(AtomicCheckpoints, ShardedModels, Trainer):
    """Trains one stage with `loss` at `beta`.

    `guard` checks the first batch, `where` is the 'file:line' of each pair, `schedule` gives the order of the pairs,
    `following` is a reference that follows the policy, and `before_checkpoint()` is called before each checkpoint is
    saved.
    """

    def __init__(
        self,
        *,
        loss: LossSum,
        beta: float,
        guard: StartGuard | None,
        stage: str,
        where: Sequence[str],
        schedule: Schedule,
        before_checkpoint: Callable[[], None] = lambda: None,
        following: EmaReference | None = None,
        **trainer: Any,
    ) -> None:
        self.aux_coefficient = router_coefficient(trainer["model"])  # of a mixture of experts
        self.loaded_dtype = next(trainer["model"].parameters()).dtype  # DeepSpeed rounds the weights to another one
        super().__init__(**trainer)
        self.remove_callback(PrinterCallback)
        self.loss, self.beta, self.stage = loss, beta, stage
        self.where, self.schedule = where, schedule
        self.guard, self.following = guard, following
        self.before_checkpoint = before_checkpoint
        if following is not None:
            self.add_callback(following)

        # Trainer would divide the loss by the number of micro-batches; compute_loss scales it by pairs instead, so
        # that every pair of a step has the same weight.
        self.loss_is_scaled_for_ga = True

        self._metrics: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._all_finite: Tensor | None = None
        self._trained: list[list[Tensor]] = []  # a cut model's weights, by the optimizer's groups
        self.rows_seen = 0

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return share_batches(super()._get_dataloader(*args, **kwargs))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's optimizer; what it trains is noted for `create_scheduler`."""
        optimizer = super().create_optimizer(*args, **kwargs)
        optimized: Any = self.model
        self._trained = [list(group["params"]) for group in optimizer.param_groups] if is_cut(optimized) else []
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's scheduler, which it makes once accelerate has prepared the optimizer.

        accelerate finds the optimizer's weights again by their addresses, and a shard without rows has none.
        """
        if self._trained and self.optimizer is not None:
            for group, weights in zip(self.optimizer.param_groups, self._trained, strict=True):
                group["params"] = weights
        return super().create_scheduler(*args, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        # with DeepSpeed, Trainer would round the reference's log-probs to the dtype of the model
        return send_to_device(data, self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.schedule.sampler() or super()._get_train_sampler(train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int:
        """The number of pairs in an optimiser step, over all its micro-batches and all ranks; each pair counts once."""
        return ranks.total(sum(batch["pairs"] for batch in batch_samples)) // ranks.tp_size()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The stage's loss, the mean over the batch's pairs, scaled to its share of the step's `num_items_in_batch`.

        1. At the first training batch, rescore the pairs without gradient, for the guard.
        2. Get the reference's log-probs: cached, or of a reference that follows the policy.
        3. Compute the policy's log-probs with the fused head, and the loss.
        4. At the first training batch, check the policy against the reference.
        5. Add the auxiliary loss of a mixture of experts whose config sets output_router_logits.
        6. Collect the metrics, and scale the loss.

        UserError if the check of the first batch fails, on all ranks if it fails on one.
        """
        batch = Batch.of(inputs)
        self._require_scored(batch)

        # the guard is used once, and never by an evaluation before training
        guard, self.guard = (self.guard, None) if model.training else (None, self.guard)
        fresh = None if guard is None else self._rescore_without_grad(model, batch)

        ref_logps = self._reference_logps(model, batch)
        sums, weights, aux_loss = batch.logps_for(model, self.loss)
        out = pair_output(sums, ref_logps, batch.rows.counts, pair_weights=weights, loss_type=self.loss, beta=self.beta)
        if guard is not None and fresh is not None:
            ranks.agree(lambda: guard.check(batch.pair_index, sums, fresh, ref_logps, float(out.loss.detach())))

        # the guard has compared the loss of the pairs alone with its start value
        if aux_loss is not None:
            loss = out.loss + self.aux_coefficient * aux_loss.to(out.loss)
            out = out._replace(loss=loss)

        # in an epoch's last step a rank may be left without pairs; it takes part all the same
        if batch.pairs:
            self._collect_metrics(out, self._terms(out, batch, weights), aux_loss, model.training)
        if model.training:
            self.rows_seen += batch.n_rows * ranks.data_world_size()

        # gradients are averaged over the ranks with different pairs, so the share is multiplied by their number
        share = 1.0 if num_items_in_batch is None else batch.pairs * ranks.data_world_size() / num_items_in_batch
        loss = out.loss if share == 1 else out.loss * share
        return (loss, {"logps": sums}) if return_outputs else loss

    def _require_scored(self, batch: Batch) -> None:
        """RuntimeError if a pair's reference was not scored: its loss would be NaN."""
        if batch.unscored:
            raise RuntimeError(
                f"stage {self.stage}: pair {self.where[batch.unscored[0]]} is trained on, but its reference was not "
                "scored; this is a mistake in sdpo_kernels, please report it"
            )

    def _reference_logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probs [2B]: cached, or in training those of a reference that follows the policy."""
        # evaluations stay comparable over a stage: they are always against its start
        if self.following is None or not model.training:
            return batch.ref_logps
        return self.following.logps(model, batch, self.loss.ld_alpha)

    def _rescore_without_grad(self, model: nn.Module, batch: Batch) -> Tensor:
        """The policy's log-probs [2B] in eval mode, for the guard."""
        model.eval()
        with torch.no_grad():
            # logps_for, as in compute_loss: with wpo's extra output the last bit may differ from a plain sum
            fresh = batch.logps_for(model, self.loss).sums
        model.train()
        return fresh

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss only; compute_loss collects the metrics."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _terms(self, out: DPOOutput, batch: Batch, weights: Tensor | None) -> dict[str, Tensor]:
        """The terms of a sum of losses, each times its weight, [B], as 'loss/<name>'; {} for a single loss."""
        if len(self.loss.terms) == 1:
            return {}
        chosen_counts, rejected_counts = batch.rows.counts.chunk(2)
        pair = PairLogps(
            out.chosen_logps, out.rejected_logps, out.ref_chosen_logps, out.ref_rejected_logps,
            chosen_counts, rejected_counts, weights,
        )  # fmt: skip
        with torch.no_grad():
            return {f"loss/{name}": part for name, part in self.loss.parts(pair, self.beta).items()}

    def _collect_metrics(
        self, out: DPOOutput, terms: dict[str, Tensor], aux_loss: Tensor | None, training: bool
    ) -> None:
        """Keep the pairs' metrics as tensors [B]: reading them here would wait for the device at every step."""
        metrics = self._metrics["train" if training else "eval"]

        # Replaces Trainer's own mean, which restarts at a resume. One entry per pair, as in the other metrics.
        metrics["loss"].append(out.loss.detach().expand(len(out.accuracy)))
        metrics["rewards/chosen"].append(out.chosen_rewards)
        metrics["rewards/rejected"].append(out.rejected_rewards)
        metrics["rewards/accuracies"].append(out.accuracy)
        metrics["rewards/margins"].append(out.margins)
        # TRL counts a tie as wrong; at a stage's start all are
        metrics["rewards/ties"].append((out.chosen_rewards == out.rejected_rewards).to(out.margins.dtype))
        metrics["logps/chosen"].append(out.chosen_logps)
        metrics["logps/rejected"].append(out.rejected_logps)
        for name, values in terms.items():
            metrics[name].append(values)
        if aux_loss is not None:
            metrics["aux_loss"].append(aux_loss.detach().expand(len(out.accuracy)))

        if training:
            finite = torch.isfinite(out.loss.detach())
            self._all_finite = finite if self._all_finite is None else self._all_finite & finite

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the pair metrics added: means over the pairs of all ranks since the last log."""
        self.require_finite()
        kind = "train" if "loss" in logs else "eval" if "eval_loss" in logs else None
        if kind is not None:
            prefix = "" if kind == "train" else "eval_"
            for name, values in self._collected(kind).items():
                # fsum rounds only once, so the order of the pairs does not matter
                logs[prefix + name] = math.fsum(values.tolist()) / len(values)
            self._metrics[kind].clear()
        super().log(logs, start_time)

    def _collected(self, kind: str) -> dict[str, Tensor]:
        """Each metric of the pairs of all ranks since the last log, on the CPU."""
        own = {name: torch.cat(values).float().cpu() for name, values in self._metrics[kind].items() if values}
        parts = ranks.exchange_parts(own)

        # sorted, as in the file of a checkpoint: a resumed run must log them in the same order
        names = sorted({name for part in parts for name in part})
        return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}

    def require_finite(self) -> None:
        """UserError if a loss was NaN or infinite: the weights are NaN now, or will be after the next step."""
        broken = self._all_finite is not None and not bool(self._all_finite)
        if ranks.total(int(broken)) > 0:
            error = UserError(
                f"stage {self.stage}: the loss became NaN or infinite at step {self.state.global_step} or shortly "
                "before; the last complete checkpoint is kept. Usual causes: a learning rate that is too "
                "high, overflow in fp16 (use bf16), or a model with broken weights"
            )
            raise ranks.everywhere(error)
        self._all_finite = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite()
        self.require_finite_weights()
        self.before_checkpoint()
        super()._save_checkpoint(model, trial)

    def last_checkpoint(self) -> Path:
        """Where the checkpoint of the current step is, or will be."""
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def keep_last_step(self) -> None:
        """Save a checkpoint of the last step, unless there is one: nothing that fails after it may lose the weights."""
        if not ranks.on_first(lambda: is_complete(self.last_checkpoint())):
            self._save_checkpoint(self.model_wrapped, None)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # resumed at the last step in the middle of an epoch, Trainer would train one more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def require_finite_weights(self) -> None:
        """UserError if the last update made a weight NaN or infinite, though every loss was finite before it."""
        broken = [name for found in ranks.exchange(not_finite(self.model)) for name in found]
        if broken:
            error = UserError(
                f"stage {self.stage}: the last step made weights NaN or infinite, first {broken[0]}; "
                "lower the learning rate"
            )
            raise ranks.everywhere(error)

    def write_extra(self, checkpoint: Path) -> None:
        """Save what makes a resumed run equal to one never stopped: metrics since the last log, a moving reference."""
        pending = self._collected("train")
        if ranks.is_first():
            save_file(pending, checkpoint / PENDING)
        if self.following is not None:
            self.following.save(checkpoint)

    def resume(self, checkpoint: Path) -> None:
        """Resume training from `checkpoint`."""
        self.guard = None  # the policy is no longer its reference

        # the file has the pending metrics of all ranks, and the next log gathers them again: they go to rank 0 only
        if ranks.is_first():
            pending = load_file(checkpoint / PENDING)
            self._metrics["train"].update({name: [values] for name, values in pending.items()})

        if self.following is not None:
            self.following.load(checkpoint)
        self.train(resume_from_checkpoint=str(checkpoint))
