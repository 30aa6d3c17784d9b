"""The memory plan: what one GPU holds at each moment of training, and the moment when that is most.

    plan = Plan.of(model_config, batch, setup)
    plan.fullest.parts       # {"weights": bytes, "gradients": bytes, …}
    plan.total

Moments, in the order of a run (with L layers; layer l keeps a_l of a micro-batch, its weights have gradients g_l):

    scoring           weights, what a layer has at once without gradient, the head's chunk
    forward's end     weights, optimizer states, Σ a_l, what the head keeps and its chunk
    head's backward   the same, and the head's gradient
    layer l           weights, optimizer states, Σ_{j<l} a_j, the layer's own backward, Σ_{j>l} g_j, the head's gradient
    backward's end    weights, optimizer states, all gradients
    optimizer step    the same, and what the optimizer computes in between

With gradient checkpointing a_l is what enters the layer. With accumulation all gradients exist from the second
micro-batch on. FSDP2 divides weights, gradients and states by the number of GPUs, and gathers one layer, and the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdpo_kernels.stepwise.memory.activations import Activations
from sdpo_kernels.stepwise.memory.batch import MicroBatch
from sdpo_kernels.stepwise.memory.head import HeadCase, HeadMemory
from sdpo_kernels.stepwise.memory.setup import Setup
from sdpo_kernels.stepwise.memory.sizes import Sizes, measure
from sdpo_kernels.stepwise.models.optimizer_states import OptimizerStates

PARTS = (
    "weights", "gradients", "optimizer", "reference", "activations", "rounded weights", "gathered weights", "head",
)  # fmt: skip
RESERVE = 2**30  # of a GPU, for CUDA's own state and memory lost between blocks: assumed, not measured


@dataclass(frozen=True)
class Moment:
    """What exists at one moment, in bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """The memory of one stage on one GPU."""

    setup: Setup
    batch: MicroBatch
    sizes: Sizes
    moments: tuple[Moment, ...]
    known_optimizer: bool

    @classmethod
    def of(cls, model_config: Any, batch: MicroBatch, setup: Setup, *, trust_remote_code: bool = False) -> Plan:
        """Plan the training of this model. Raises whatever building or tracing the model raises."""
        sizes, found = measure(model_config, batch, setup, trust_remote_code=trust_remote_code)
        moments = _Moments(setup, batch, sizes, found)
        known = OptimizerStates.of(setup.optimizer).known
        return cls(setup, batch, sizes, tuple(moments.all()), known)

    @property
    def fullest(self) -> Moment:
        """The moment with most memory."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return self.fullest.total

    @property
    def fits(self) -> bool:
        """Whether that is within the GPU's memory, with the reserve."""
        return self.setup.memory is None or self.total + RESERVE <= self.setup.memory


class _Moments:
    """The arithmetic of the module's docstring."""

    def __init__(self, setup: Setup, batch: MicroBatch, sizes: Sizes, found: Activations) -> None:
        self.setup, self.sizes, self.found = setup, sizes, found
        self.parts = setup.gpus if setup.sharded else 1  # the model's, each on a GPU of its own
        self.head_is_cut = setup.sharded and not sizes.tied
        self.head = HeadMemory.of(self._head_case(batch))
        self.compute = setup.body_dtype.itemsize

        # DDP has one more copy of the gradients, in buckets; FSDP2 keeps them whole until a step's last micro-batch
        self.accumulates = setup.accumulation > 1
        self.whole = setup.sharded and self.accumulates and not setup.syncs_each
        self.all_gradients = self._share(sizes.gradients)
        if self.whole:
            head = sizes.head_gradient if self.head_is_cut else 0
            self.all_gradients = sizes.gradients - head + self._share(head)
        self.buckets = sizes.gradients if setup.gpus > 1 and not setup.sharded else 0

    def all(self) -> Iterator[Moment]:
        """Every moment of a step; of the layers' backward the fullest."""
        yield self._forward_end()
        yield self._head_backward()
        yield max((self._layer_backward(number) for number in range(len(self.found.layers))), key=lambda m: m.total)
        yield self._backward_end()
        yield self._optimizer_step()

    def _moment(self, name: str, gathered: int = 0, **parts: int) -> Moment:
        """A moment with the parts that are always there."""
        named = {name.replace("_", " "): size for name, size in parts.items()}
        named["gradients"] = named.get("gradients", 0) + self.buckets
        named["weights"] = self._share(self.sizes.weights)
        named["optimizer"] = self._share(self.sizes.states) + named.get("optimizer", 0)
        named["reference"] = 2 * self.sizes.gradients if self.setup.follows else 0
        named["gathered weights"] = gathered
        return Moment(name, {part: named[part] for part in PARTS if named.get(part)})

    def _forward_end(self) -> Moment:
        checkpointed = self.setup.checkpointing
        copies = sum(layer.cached if checkpointed else layer.copies for layer in self._every())
        return self._moment(
            "forward's end",
            gathered=self._root() + self._layer_gathered(len(self.found.layers) - 1),
            activations=self._kept(len(self.found.layers)),
            rounded_weights=copies,
            head=self.head.kept + self.head.forward,
            gradients=self.all_gradients if self.accumulates else 0,
        )

    def _head_backward(self) -> Moment:
        copies = 0 if self.setup.checkpointing else sum(layer.copies for layer in self._every())
        gradient = self.sizes.head_gradient
        existing = self.all_gradients if self.accumulates else 0
        return self._moment(
            "head's backward",
            gathered=self._root() + self._layer_gathered(len(self.found.layers) - 1),
            activations=self._kept(len(self.found.layers)),
            rounded_weights=copies,
            head=self.head.kept + self.head.backward,
            gradients=existing + (self._share(gradient) if self.head_is_cut else gradient),
        )

    def _layer_backward(self, number: int) -> Moment:
        layer, sizes = self.found.layers[number], self.sizes.layers
        own, heaviest = sizes[number].gradients, self.found.layers[self.found.heaviest]
        traced = sizes[self.found.heaviest].trained * self.compute if self.setup.sharded else sizes[self.found.heaviest].gradients
        # of the heaviest layer alone: what it has at once beyond what it keeps and its weights' gradients
        scratch = max(0, self.found.backward_work - heaviest.kept - heaviest.copies - traced)
        working = layer.kept + scratch + (layer.entering if self.setup.checkpointing else 0) + self.sizes.unpacked

        head = self.sizes.head_gradient
        later = self._share(sum(size.gradients for size in sizes[number + 1 :]))
        gradients = later + (self._share(head) if self.head_is_cut else head) + own
        if self.accumulates:
            gradients = self.all_gradients + min(own, self.sizes.largest)
        copies = 0 if self.setup.checkpointing else sum(l.copies for l in self.found.layers[:number])
        copies += layer.copies + self.found.outside.copies
        return self._moment(
            "a layer's backward",
            gathered=self._root() + self._layer_gathered(number, reduces=True),
            activations=self._kept(number) + working,
            rounded_weights=copies,
            gradients=gradients,
        )

    def _backward_end(self) -> Moment:
        # a tied weight's two gradients are added up at the end; accumulated ones are added to those that exist
        more = self.sizes.embedding_gradient
        extra = more * ((1 if self.sizes.tied else 0) + (1 if self.accumulates else 0))
        return self._moment(
            "backward's end",
            gathered=self._root(),
            activations=self.found.outside.kept,
            gradients=self.all_gradients + extra,
        )

    def _optimizer_step(self) -> Moment:
        name, device = self.setup.optimizer, self.setup.device
        between = self._share(self.sizes.largest)
        if name.endswith("fused"):
            between = 0
        elif name == "adamw_torch" and device == "cuda":
            between = self._share(self.sizes.gradients)  # computed for all weights at once
        elif name == "adafactor":
            between *= 3
        return self._moment("optimizer's step", gradients=self._share(self.sizes.gradients), optimizer=between)

    def _kept(self, layers: int) -> int:
        """What the first layers keep for their backward, and what lies around the layers."""
        kept = (l.entering if self.setup.checkpointing else l.kept for l in self.found.layers[:layers])
        return sum(kept) + self.found.outside.kept

    def _every(self) -> list[Any]:
        return [*self.found.layers, self.found.outside]

    def _share(self, size: int) -> int:
        """One GPU's part of what FSDP2 divides."""
        return -(-size // self.parts)

    def _root(self) -> int:
        """Under FSDP2, the gathered weights outside the layers; a head of its own is never gathered."""
        if not self.setup.sharded:
            return 0
        in_layers = sum(size.numbers for size in self.sizes.layers)
        return self.compute * (self.sizes.numbers - in_layers - (self.sizes.head if self.head_is_cut else 0))

    def _layer_gathered(self, number: int, *, reduces: bool = False) -> int:
        """Under FSDP2, a layer's weights and the next one's; with `reduces` its gradients in float32, to be summed."""
        if not self.setup.sharded:
            return 0
        layers = self.sizes.layers
        at_once = layers if not self.setup.reshards else layers[max(0, number - 1) : number + 1]
        gathered = self.compute * sum(layer.numbers for layer in at_once)
        return gathered + (layers[number].trained * 4 if reduces else 0)

    def _head_case(self, batch: MicroBatch) -> HeadCase:
        setup, sizes = self.setup, self.sizes
        return HeadCase(
            tokens=batch.tokens,
            rows=batch.rows,
            columns=sizes.vocabulary,
            width=sizes.width,
            hidden_dtype=self.found.hidden_dtype,
            weight_dtype=sizes.head_dtype,
            compute=setup.compute or self.found.hidden_dtype,
            trains=sizes.head_gradient > 0,
            gathered=batch.shared,
            device=setup.device,
            memory=setup.memory,
            is_cut=self.head_is_cut,
        )
