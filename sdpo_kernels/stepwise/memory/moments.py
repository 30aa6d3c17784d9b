"""What one GPU holds at the moments of a stage that can be the fullest.

With L layers, of which layer l keeps a_l of a micro-batch for its backward and has weights with gradients g_l:

    scoring             weights, and a layer without gradient, or the head, at work on the largest batch that is scored
    forward's end       weights, states, Σ a_l, what the head keeps, and its scratch memory
    head's backward     the same, and the head's gradient
    a layer's backward  weights, states, Σ_{j<l} a_j, layer l at work, Σ_{j>l} g_j, the head's gradient; the fullest l
    backward's end      weights, states, all gradients
    optimizer's step    the same, and what the optimizer computes in between

Rounded copies of weights, which autocast makes, are kept like a_l. With gradient checkpointing a_l is what enters the
layer, and the copies of trained weights exist to the end of the forward. With accumulation all gradients exist from a
step's second micro-batch on. DDP has one more copy of the gradients. FSDP2 divides weights, gradients and states by the
number of GPUs, and gathers a layer and the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sdpo_kernels.stepwise.memory.activations import Activations
from sdpo_kernels.stepwise.memory.batch import MicroBatch
from sdpo_kernels.stepwise.memory.head import HeadCase, HeadMemory
from sdpo_kernels.stepwise.memory.setup import Setup
from sdpo_kernels.stepwise.memory.sizes import Sizes

PARTS = (
    "weights", "gradients", "optimizer", "reference", "activations", "rounded weights", "gathered weights", "head",
)  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """What exists at one moment, in bytes by part."""

    name: str
    parts: dict[str, int]
    scratch: int = 0  # of these, what the head's kernels allocate for themselves

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


class Moments:
    """The arithmetic above, for one micro-batch and the tokens of the largest batch that is scored."""

    def __init__(self, setup: Setup, batch: MicroBatch, scored: int, sizes: Sizes, found: Activations) -> None:
        self.setup, self.batch, self.scored, self.sizes, self.found = setup, batch, scored, sizes, found
        self.compute = setup.body_dtype.itemsize
        self.head_is_cut = setup.sharded and not sizes.tied
        self.head = HeadMemory.of(self._head_case())
        self.accumulates = setup.accumulation > 1

        # while micro-batches accumulate, FSDP2 keeps the gradients of the layers whole
        self.all_gradients = self._share(sizes.gradients)
        if setup.sharded and self.accumulates and not setup.syncs_each:
            head = sizes.head_gradient if self.head_is_cut else 0
            self.all_gradients = sizes.gradients - head + self._share(head)

    def all(self) -> Iterator[Moment]:
        """Every moment, in order."""
        layers = (self._layer_backward(number) for number in range(len(self.found.layers)))
        yield self._scoring()
        yield self._forward_end()
        yield self._head_backward()
        yield max(layers, key=lambda moment: moment.total)
        yield self._backward_end()
        yield self._optimizer_step()

    def _moment(self, name: str, changing: dict[str, int], scratch: int = 0) -> Moment:
        """A moment with what is always there, too."""
        setup, sizes = self.setup, self.sizes
        always = {
            "weights": self._share(sizes.weights),
            "optimizer": self._share(sizes.states),
            "reference": 2 * sizes.gradients if setup.follows else 0,  # ema: the average and the reference
            "gradients": sizes.gradients if setup.replicas > 1 and not setup.sharded else 0,  # DDP's buckets
        }
        parts = {part: always.get(part, 0) + changing.get(part, 0) for part in PARTS}
        return Moment(name, {part: size for part, size in parts.items() if size}, scratch)

    def _scoring(self) -> Moment:
        """References before training, without the optimizer; evaluations while training, with it."""
        ratio = self.scored / self.batch.tokens
        growing = self.found.forward_work - self.found.forward_fixed + self.found.layers[self.found.heaviest].entering
        layer = int(growing * ratio) + self.found.forward_fixed + self.sizes.unpacked
        rows = int(self.batch.rows * ratio)
        case = replace(self._head_case(), tokens=self.scored, rows=rows, trains=False)
        if not self.setup.evaluates:
            case = replace(case, lora=0)  # the reference has no adapter
        memory = HeadMemory.of(case)
        head = memory.kept - memory.stash + memory.forward

        # the layers are done when the head begins
        at_work = {"activations": layer} if layer > head else {"head": head}
        changing = at_work | {
            "rounded weights": sum(part.copies for part in self.found.layers),
            "gathered weights": self._gathered(len(self.found.layers) - 1),
        }
        moment = self._moment("scoring", changing, memory.forward if "head" in at_work else 0)
        if self.setup.evaluates:
            return moment
        before = {"weights", "activations", "rounded weights", "gathered weights", "head"}
        parts = {part: size for part, size in moment.parts.items() if part in before}
        return Moment(moment.name, parts, moment.scratch)

    def _forward_end(self) -> Moment:
        all_layers = [*self.found.layers, self.found.outside]
        changing = {
            "activations": self._kept(len(self.found.layers)),
            "rounded weights": sum(part.cached if self.setup.checkpointing else part.copies for part in all_layers),
            "gathered weights": self._gathered(len(self.found.layers) - 1),
            "head": self.head.kept + self.head.forward,
            "gradients": self.all_gradients if self.accumulates else 0,
        }
        return self._moment("forward's end", changing, self.head.forward)

    def _head_backward(self) -> Moment:
        gradient = self.sizes.head_gradient
        changing = {
            "activations": self._kept(len(self.found.layers)),
            "rounded weights": self._copies(len(self.found.layers)),
            "gathered weights": self._gathered(len(self.found.layers) - 1),
            "head": self.head.kept + self.head.backward,
            "gradients": (self.all_gradients if self.accumulates else 0)
            + (self._share(gradient) if self.head_is_cut else gradient),
        }
        return self._moment("head's backward", changing, self.head.scratch)

    def _layer_backward(self, number: int) -> Moment:
        layer, sizes, head = self.found.layers[number], self.sizes.layers, self.sizes.head_gradient

        # gradients: those of the layers above, and this layer's own, which FSDP2 has yet to divide
        own = sizes[number].trained * self.compute if self.setup.sharded else sizes[number].gradients
        later = self._share(sum(size.gradients for size in sizes[number + 1 :]))
        gradients = later + (self._share(head) if self.head_is_cut else head) + own
        if self.accumulates:
            gradients = self.all_gradients + min(own, self.sizes.largest)

        entering = layer.entering if self.setup.checkpointing else 0
        changing = {
            "activations": self._kept(number) + entering + layer.kept + self._work() + self.sizes.unpacked,
            "rounded weights": self._copies(number) + layer.copies,
            "gathered weights": self._gathered(number, reduces=True),
            "gradients": gradients,
        }
        return self._moment("a layer's backward", changing)

    def _backward_end(self) -> Moment:
        # a tied weight's two gradients are added up at the end; accumulated ones are added to those that exist
        new = self.sizes.embedding_gradient
        extra = new * (int(self.sizes.tied) + int(self.accumulates))
        changing = {
            "activations": self.found.outside.kept,
            "gathered weights": self._gathered(None),
            "gradients": self.all_gradients + extra,
        }
        return self._moment("backward's end", changing)

    def _optimizer_step(self) -> Moment:
        name, between = self.setup.optimizer, self._share(self.sizes.largest)
        if name.endswith("fused"):
            between = 0
        elif name == "adamw_torch" and self.setup.device == "cuda":
            between = self._share(self.sizes.gradients)  # a square root for all weights at once
        elif name == "adafactor":
            between *= 3
        return self._moment("optimizer's step", {"gradients": self._share(self.sizes.gradients), "optimizer": between})

    def _kept(self, layers: int) -> int:
        """What the first layers keep for their backward, and what lies around the layers."""
        kept = [part.entering if self.setup.checkpointing else part.kept for part in self.found.layers[:layers]]
        return sum(kept) + self.found.outside.kept

    def _copies(self, layers: int) -> int:
        """Rounded weights of the first layers in the backward, where checkpointing keeps none."""
        copies = [0 if self.setup.checkpointing else part.copies for part in self.found.layers[:layers]]
        return sum(copies) + self.found.outside.copies

    def _work(self) -> int:
        """What the heaviest layer has at once in its backward, beyond what it keeps and its weights' gradients."""
        number = self.found.heaviest
        layer, size = self.found.layers[number], self.sizes.layers[number]
        gradients = size.trained * self.compute if self.setup.sharded else size.gradients
        return max(0, self.found.backward_work - layer.kept - layer.copies - gradients)

    def _share(self, size: int) -> int:
        """One GPU's part of what FSDP2 divides."""
        return -(-size // self.setup.gpus) if self.setup.sharded else size

    def _gathered(self, number: int | None, *, reduces: bool = False) -> int:
        """Under FSDP2, whole weights: those outside the layers, of layer `number` and of the one before it.

        With `reduces` also the layer's gradients in float32, on their way to being summed.
        """
        if not self.setup.sharded:
            return 0
        layers, sizes = self.sizes.layers, self.sizes
        head = sizes.head if self.head_is_cut else 0  # is never gathered
        numbers = sizes.numbers - sum(layer.numbers for layer in layers) - head
        if number is not None:
            at_once = layers[max(0, number - 1) : number + 1] if self.setup.reshards else layers
            numbers += sum(layer.numbers for layer in at_once)
        return self.compute * numbers + (4 * layers[number].trained if reduces and number is not None else 0)

    def _head_case(self) -> HeadCase:
        setup, sizes, batch = self.setup, self.sizes, self.batch
        return HeadCase(
            tokens=batch.tokens,
            rows=batch.rows,
            columns=sizes.vocabulary,
            width=sizes.width,
            hidden_dtype=self.found.hidden_dtype,
            weight_dtype=sizes.head_dtype,
            compute=setup.compute or self.found.hidden_dtype,
            trains=sizes.head_gradient > 0 or sizes.head_lora > 0,
            gathered=batch.shared,
            device=setup.device,
            memory=setup.memory,
            is_cut=self.head_is_cut,
            lora=0 if self.head_is_cut else sizes.head_lora,  # a cut head adds its delta to its rows
            grad_tol=setup.grad_tol,
        )
