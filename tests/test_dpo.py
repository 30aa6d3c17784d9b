"""fused_linear_dpo: losses and gradients against float64, padded = packed, both reference paths, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from sdpo_kernels import FusedLinearDPOLoss, dpo, fused_linear_dpo
from sdpo_kernels.dpo_output import DPOOutput, pair_output
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows, sequence_logps
from tests.reference import chunk_columns, error, logits_of, size, skip_unless_served, target_logps

pytestmark = pytest.mark.usefixtures("each_backend")
EPS = torch.finfo(torch.float32).eps
LOSSES = [
    ("sigmoid", {}),
    ("sigmoid", {"label_smoothing": 0.2}),
    ("robust", {"label_smoothing": 0.1}),
    ("hinge", {}),
    ("ipo", {}),
]


class Batch:
    """A padded batch of 2B sequences in float64, with a reference model of another width."""

    def __init__(self, n_pairs: int, length: int, width: int, n_columns: int, seed: int = 0, bias: bool = False):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n = 2 * n_pairs
        self.hidden, self.weight = normal(n, length, width), normal(n_columns, width)
        self.bias = normal(n_columns) if bias else None
        self.ref_hidden, self.ref_weight = normal(n, length, width + 1), normal(n_columns, width + 1)
        self.ref_bias = normal(n_columns) if bias else None
        self.lengths = torch.randint(1, length + 1, (n,), generator=generator)
        prompts = (torch.rand(n, generator=generator) * self.lengths).long()
        position = torch.arange(length)
        scored = (position >= prompts[:, None]) & (position < self.lengths[:, None])
        self.labels = torch.randint(n_columns, (n, length), generator=generator).masked_fill(~scored, IGNORE_INDEX)

    def cast(self, dtype: torch.dtype) -> Batch:
        """The same batch in `dtype`."""
        other = object.__new__(Batch)
        other.__dict__ = {k: v.to(dtype) if _floating(v) else v for k, v in self.__dict__.items()}
        return other

    def packed(self) -> tuple[Batch, torch.Tensor]:
        """The sequences end to end without padding, and their borders."""
        kept = torch.arange(self.labels.shape[1]) < self.lengths[:, None]
        other = object.__new__(Batch)
        other.__dict__ = dict(self.__dict__)
        for name in ("hidden", "ref_hidden", "labels"):
            setattr(other, name, getattr(self, name)[kept])
        return other, torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])

    def reference(self) -> dict[str, torch.Tensor | None]:
        return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight, "ref_bias": self.ref_bias}

    def sums(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **head) -> torch.Tensor:
        """Summed log-probs [2B], in the most obvious way."""
        return target_logps(logits_of(states, weight, bias, **head), self.labels).sum(1)


def _floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def written_out(policy: torch.Tensor, ref: torch.Tensor, counts: torch.Tensor, beta: float, name: str, e: float = 0.0):
    """The mean loss, as in the papers."""
    (lw, ll), (rw, rl), (nw, nl) = policy.chunk(2), ref.chunk(2), counts.chunk(2)
    z = beta * ((lw - rw) - (ll - rl))
    if name == "sigmoid":
        each = -(1 - e) * z.sigmoid().log() - e * (-z).sigmoid().log()
    elif name == "robust":
        each = (-(1 - e) * z.sigmoid().log() + e * (-z).sigmoid().log()) / (1 - 2 * e)
    elif name == "hinge":
        each = (1 - z).clamp(min=0)
    else:
        each = ((lw - rw) / nw - (ll - rl) / nl - 1 / (2 * beta)) ** 2
    return each.mean()


def with_gradients(batch: Batch, **keywords):
    """fused_linear_dpo's output and the gradients of hidden, weight and bias."""
    inputs = [batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()]
    if batch.bias is not None:
        inputs.append(batch.bias.clone().requires_grad_())
        keywords["bias"] = inputs[2]
    out = fused_linear_dpo(inputs[0], inputs[1], batch.labels, **keywords)
    return out, torch.autograd.grad(out.loss, inputs)


@pytest.mark.parametrize(("name", "options"), LOSSES, ids=str)
@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 8), st.integers(1, 90), st.integers(0, 2**31),
    st.booleans(), st.sampled_from([{}, {"temperature": 1.6, "logit_scale": 0.5, "softcap": 3.0}]),
)  # fmt: skip
def test_loss_and_gradients_in_float64(
    name, options, each_backend, n_pairs, length, width, n_columns, seed, bias, head
):
    skip_unless_served(each_backend, torch.float64)
    batch = Batch(n_pairs, length, width, n_columns, seed, bias)
    leaves = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias) if t is not None]
    policy = batch.sums(*(leaves if bias else [*leaves, None]), **head)
    ref = batch.sums(batch.ref_hidden, batch.ref_weight, batch.ref_bias, **head)
    counts = (batch.labels != IGNORE_INDEX).sum(1)
    truth = written_out(policy, ref, counts, 0.3, name, options.get("label_smoothing", 0.0))
    gradients = torch.autograd.grad(truth, leaves)
    with chunk_columns(33):
        out, found = with_gradients(batch, **batch.reference(), beta=0.3, loss_type=name, **head, **options)
    assert error(out.loss.detach(), truth.detach()) <= 1e-12 * max(1.0, truth.abs().item())
    for mine, right in zip(found, gradients, strict=True):
        assert error(mine, right) <= 1e-12 * max(1.0, size(right))
    lw, ll = policy.detach().chunk(2)
    rw, rl = ref.chunk(2)
    named = [lw, ll, rw, rl, 0.3 * (lw - rw), 0.3 * (ll - rl), 0.3 * ((lw - rw) - (ll - rl))]
    for mine, right in zip(out[1:8], named, strict=True):
        assert mine.shape == (n_pairs,)
        assert not mine.requires_grad
        assert error(mine, right) <= 1e-11
    assert out.accuracy.tolist() == (out.chosen_rewards > out.rejected_rewards).double().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), LOSSES, ids=str)
def test_loss_and_gradients_in_lower_precision(name, options, dtype):
    batch = Batch(4, 24, 32, 700, bias=True).cast(dtype)
    out, found = with_gradients(batch, **batch.reference(), loss_type=name, **options)
    counts = (batch.labels != IGNORE_INDEX).sum(1)

    def naive(working: torch.dtype):
        leaves = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
        if working == torch.float64:
            leaves = [t.detach().double().requires_grad_() for t in leaves]
        policy = batch.sums(*(t.to(working) for t in leaves))
        ref = batch.sums(*(t.to(working) for t in batch.reference().values()))
        loss = written_out(policy, ref, counts, 0.1, name, options.get("label_smoothing", 0.0))
        return loss, torch.autograd.grad(loss, leaves)

    truth, plain = naive(torch.float64), naive(torch.float32)
    rounding = 4 * EPS * max(size(truth[0]), size(out.chosen_logps), size(out.ref_chosen_logps)) * 0.1
    assert out.loss.dtype == torch.float32
    assert error(out.loss.detach(), truth[0].detach()) <= 3 * error(plain[0], truth[0]) + rounding
    for mine, theirs, right in zip(found, plain[1], truth[1], strict=True):
        assert mine.dtype == dtype
        assert error(mine, right) <= 2 * error(theirs, right) + 2 * torch.finfo(dtype).eps * size(right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows_given", [False, True])
def test_packed_is_padded(dtype, rows_given):
    batch = Batch(3, 11, 8, 60, seed=4).cast(dtype)
    packed, borders = batch.packed()
    rows = [None, None]
    if rows_given:
        rows = [ScoredRows.from_labels(batch.labels), ScoredRows.from_labels(packed.labels, borders)]
    one, (d_hidden, d_weight) = with_gradients(batch, **batch.reference(), rows=rows[0])
    other, found = with_gradients(packed, **packed.reference(), rows=rows[1], cu_seqlens=borders)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)  # the same scored rows reach the same products
    kept = torch.arange(11) < batch.lengths[:, None]
    assert torch.equal(d_hidden[kept], found[0])
    assert not d_hidden[~kept].any()
    assert torch.equal(d_weight, found[1])


def test_cached_reference_logps_equal_those_scored_in_the_call():
    batch = Batch(3, 11, 8, 60, seed=4, bias=True).cast(torch.float32)
    now, gradients = with_gradients(batch, **batch.reference())
    cached = torch.cat([now.ref_chosen_logps, now.ref_rejected_logps])
    before, found = with_gradients(batch, ref_logps=cached)
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, found, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_reference_with_the_same_head_needs_no_pass_of_its_own(monkeypatch, frozen):
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 4, 6, 8, generator=generator).unbind(0)
    weight = torch.randn(70, 8, generator=generator).requires_grad_(not frozen)
    labels = torch.randint(70, (4, 6), generator=generator)
    labels[:, :2] = -100
    calls = []
    whole = dpo.linear_logps
    monkeypatch.setattr(dpo, "linear_logps", lambda *args, **options: calls.append(options) or whole(*args, **options))
    found = []
    for ref_weight in (weight, weight.detach().clone()):
        policy = hidden.clone().requires_grad_()
        out = fused_linear_dpo(policy, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight)
        found.append([*out, *torch.autograd.grad(out.loss, [policy] if frozen else [policy, weight])])
    assert [options.get("ref_hidden") is not None for options in calls] == [True, False, False]
    for together, apart in zip(*found, strict=True):
        assert torch.equal(together, apart)


def test_the_reference_gets_no_gradient():
    batch = Batch(2, 5, 4, 30).cast(torch.float32)
    reference = {name: t.requires_grad_() for name, t in batch.reference().items() if t is not None}
    fused_linear_dpo(batch.hidden.requires_grad_(), batch.weight, batch.labels, **reference).loss.backward()
    assert all(t.grad is None for t in reference.values())
    ref_logps = torch.zeros(4, requires_grad=True)
    fused_linear_dpo(batch.hidden, batch.weight, batch.labels, ref_logps=ref_logps).loss.backward()
    assert ref_logps.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "robust"])
def test_a_policy_equal_to_its_reference_has_loss_ln_2_and_margins_of_exactly_0(name, dtype, each_backend):
    skip_unless_served(each_backend, dtype)
    batch = Batch(3, 20, 16, 500).cast(dtype)
    out, _ = with_gradients(batch, ref_hidden=batch.hidden, ref_weight=batch.weight, loss_type=name)
    assert abs(out.loss.item() - math.log(2)) <= EPS
    assert not out.margins.any()
    assert not out.chosen_rewards.any()
    assert not out.accuracy.any()


def test_the_module_is_the_function():
    batch = Batch(2, 6, 5, 40, bias=True).cast(torch.float32)
    settings = {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.1, "stash_bytes": 0, "backend": "eager"}
    settings |= {"softcap": 5.0, "temperature": 2.0, "logit_scale": 0.5}
    module = FusedLinearDPOLoss(**settings)
    tensors = {"bias": batch.bias, **batch.reference()}
    one = module(batch.hidden, batch.weight, batch.labels, **tensors)
    other = fused_linear_dpo(batch.hidden, batch.weight, batch.labels, **tensors, **settings)
    assert isinstance(one, DPOOutput)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    shown = repr(module)
    assert all(f"{name}={value!r}" in shown for name, value in settings.items())
    with pytest.raises(ValueError, match=r"^beta: was given to the call, must be given to FusedLinearDPOLoss"):
        module(batch.hidden, batch.weight, batch.labels, beta=0.2)
    with pytest.raises(ValueError, match=r"^beta: was 0, must be"):
        FusedLinearDPOLoss(beta=0)
    for wrong in (0.9, "a"):
        with pytest.raises(ValueError, match=rf"^label_smoothing: was {wrong!r}, must be at least 0 and below 0.5"):
            FusedLinearDPOLoss(label_smoothing=wrong)


def test_repeated_calls_give_the_same_bits():
    batch = Batch(4, 30, 16, 900).cast(torch.bfloat16)
    one, gradients = with_gradients(batch, **batch.reference())
    other, found = with_gradients(batch, **batch.reference())
    assert torch.equal(one.loss, other.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, found, strict=True))


def test_all_stash_sizes_agree():
    batch = Batch(3, 9, 7, 300).cast(torch.float32)
    results = [with_gradients(batch, **batch.reference(), stash_bytes=size)[1] for size in (0, 30_000, 10**9)]
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert error(a, b) <= 4 * EPS * size(b)


def test_sequences_may_be_stored_in_any_order_if_rows_say_so(each_backend):
    """c0, r0, c1, r1: `segment` says which sequence a row belongs to."""
    batch = Batch(2, 6, 5, 40, seed=2).cast(torch.float32)
    ref = batch.sums(batch.ref_hidden, batch.ref_weight, None)
    wanted, gradients = with_gradients(batch, ref_logps=ref)
    stored = [0, 2, 1, 3]
    batch.hidden, batch.labels = batch.hidden[stored], batch.labels[stored]
    rows = ScoredRows.from_labels(batch.labels)
    rows = ScoredRows(rows.index, torch.tensor(stored)[rows.segment], rows.counts[stored])
    out, found = with_gradients(batch, ref_logps=ref, rows=rows)
    assert [torch.equal(a, b) for a, b in zip(out, wanted, strict=True)] == [True] * len(wanted)
    # torch's products may depend on where a row stands, in the last bits; native's do not
    eps = 0.0 if each_backend == "native" else 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found[0], gradients[0][stored], rtol=eps, atol=eps * gradients[0].abs().max().item())


@pytest.mark.parametrize("given_rows", [False, True], ids=["rows found", "rows given"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compile_without_a_graph_break(given_rows, packed):
    torch._dynamo.reset()
    batch = Batch(2, 6, 5, 40).cast(torch.float32)
    borders = None
    if packed:
        batch, borders = batch.packed()
    keywords = {**batch.reference(), "cu_seqlens": borders}
    if given_rows:
        keywords["rows"] = ScoredRows.from_labels(batch.labels, borders)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    compiled = torch.compile(fused_linear_dpo, fullgraph=True, backend="aot_eager")
    results = [f(hidden, weight, batch.labels, **keywords) for f in (compiled, fused_linear_dpo)]
    for a, b in zip(*results, strict=True):
        assert error(a.detach(), b.detach()) <= 4 * EPS * max(1.0, size(b.detach()))
    gradients = [torch.autograd.grad(out.loss, (hidden, weight)) for out in results]
    for a, b in zip(*gradients, strict=True):
        assert error(a, b) <= 4 * EPS * size(b)


@pytest.mark.parametrize("given_rows", [False, True], ids=["rows found", "rows given"])
def test_ops_that_find_their_rows_are_kept_out_of_cuda_graphs(given_rows):
    """Counting the rows waits for the device, which `mode="reduce-overhead"` must not capture; given rows may be."""
    torch._dynamo.reset()
    batch, ops = Batch(2, 6, 5, 40).cast(torch.float32), []

    def noted(graph, inputs):
        ops.extend(node.target for node in graph.graph.nodes if "linear_logps" in str(node.target))
        return graph

    keywords = {"rows": ScoredRows.from_labels(batch.labels)} if given_rows else {}
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    backend = aot_autograd(fw_compiler=noted, bw_compiler=noted)
    step = torch.compile(fused_linear_dpo, fullgraph=True, backend=backend)
    step(hidden, weight, batch.labels, **batch.reference(), **keywords).loss.backward()
    assert {"backward" in str(op) for op in ops} == {True, False}
    assert {torch.Tag.cudagraph_unsafe in op.tags for op in ops} == {not given_rows}


@pytest.mark.slow
def test_compile_with_the_default_backend():
    torch._dynamo.reset()
    batch = Batch(2, 6, 5, 40).cast(torch.float32)
    weight = batch.weight.requires_grad_()
    compiled = torch.compile(fused_linear_dpo, fullgraph=True)
    results = [f(batch.hidden, weight, batch.labels, **batch.reference()).loss for f in (compiled, fused_linear_dpo)]
    assert error(*(loss.detach() for loss in results)) <= 4 * EPS
    a, b = (torch.autograd.grad(loss, weight)[0] for loss in results)
    assert error(a, b) <= 4 * EPS * size(b)


def test_sequence_sums_are_taken_in_float64():
    logps = torch.cat([torch.tensor([-1e6]), torch.full((1000,), -0.03)])
    rows = ScoredRows.from_labels(torch.zeros(1, 1001, dtype=torch.int64))
    assert sequence_logps(logps, rows).item() == torch.tensor(-1e6 - 30).item()


def test_pair_output_takes_sums_of_any_reference_dtype():
    counts = torch.tensor([3, 4])
    out = pair_output(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0], dtype=torch.float64), counts)
    assert out.loss.dtype == torch.float32
    assert out.margins.tolist() == [0.0]


# --- errors -----------------------------------------------------------------------------------------------------

LABELS = torch.tensor([[1, 2, -100], [-100, 3, 4]])
PACKED = {"hidden": torch.zeros(6, 5), "labels": LABELS.reshape(-1), "cu_seqlens": torch.tensor([0, 3, 6])}
NO_REFERENCE = {"ref_logps": None}


def call(**changes):
    """fused_linear_dpo on a valid padded pair with `changes`."""
    inputs = {
        "hidden": torch.zeros(2, 3, 5),
        "weight": torch.zeros(9, 5),
        "labels": LABELS,
        "ref_logps": torch.zeros(2),
    }
    inputs |= changes
    return fused_linear_dpo(inputs.pop("hidden"), inputs.pop("weight"), inputs.pop("labels"), **inputs)  # fmt: skip


def test_the_valid_calls_are_accepted():
    assert abs(call().loss.item() - math.log(2)) <= EPS
    assert abs(call(**PACKED).loss.item() - math.log(2)) <= EPS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(6, 5)}, r"hidden: was of shape \[6, 5\], must be \[2B, T, H\], or \[N, H\] with"),
        ({**PACKED, "hidden": torch.zeros(2, 3, 5)}, r"hidden: was of shape \[2, 3, 5\], must be packed \[N, H\]"),
        ({"hidden": torch.zeros(3, 3, 5), "labels": torch.ones(3, 3).long()}, r"hidden: was of 3 sequences, must be"),
        ({"hidden": torch.zeros(0, 3, 5), "labels": torch.ones(0, 3).long()}, r"hidden: was of 0 sequences, must be"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 2, 4, 6])}, r"cu_seqlens: was of 3 sequences, must be an even"),
        ({**PACKED, "cu_seqlens": torch.tensor([0.0, 3.0, 6.0])}, r"cu_seqlens: was torch.float32 of shape \[3\]"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 3, 5])}, r"cu_seqlens: was \[0, 3, 5\], must ascend from 0 to 6"),
        ({**PACKED, "cu_seqlens": torch.tensor([1, 3, 6])}, r"cu_seqlens: was \[1, 3, 6\], must ascend from 0 to 6"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 4, 3, 5, 6])}, r"cu_seqlens: was \[0, 4, 3, 5, 6\], must ascend"),
        ({"labels": LABELS[:, :2]}, r"labels: was torch.int64 of shape \[2, 2\], must be .* \[2, 3\]"),
        ({"labels": LABELS.int()}, r"labels: was torch.int32 of shape \[2, 3\], must be torch.int64"),
        ({"labels": torch.full((2, 3), -100)}, r"labels: sequence 0 has no scored token \(all are -100\), must have"),
        ({"labels": torch.tensor([[1, 2, 3], [-100] * 3])}, r"labels: sequence 1 has no scored token"),
        ({"labels": torch.tensor([[1, 2, 3], [-100, 9, 1]])}, r"labels: held 9, must be in \[0, 9\)"),
        ({"rows": ScoredRows.from_labels(LABELS[:1])}, r"rows: was of 1 sequences, 2 rows and 2 segments"),
        ({"rows": ScoredRows.from_labels(LABELS)._replace(segment=torch.tensor([0, 0, 1, 2]))},
         r"rows: its segment held 2, must be in \[0, 2\)"),
        ({"rows": ScoredRows.from_labels(LABELS)._replace(segment=torch.tensor([0, 0, 1, 0]))},
         r"rows: its counts held 2 for sequence 0, must be 3, as often as its segment holds it"),
        ({"rows": ScoredRows.from_labels(LABELS)._replace(counts=torch.tensor([2, 3]))},
         r"rows: its counts held 3 for sequence 1, must be 2"),
        (NO_REFERENCE, r"ref_logps: was None, must be given: either ref_logps, or both"),
        ({**NO_REFERENCE, "ref_hidden": torch.zeros(2, 3, 5)}, r"ref_weight: was None, must be given"),
        ({**NO_REFERENCE, "ref_weight": torch.zeros(9, 5)}, r"ref_hidden: was None, must be given"),
        ({"ref_weight": torch.zeros(9, 5)}, r"ref_logps: was given together with ref_hidden"),
        ({"ref_logps": torch.zeros(1)}, r"ref_logps: was of shape \[1\], must be \[2\], summed log-probs"),
        ({"ref_logps": torch.zeros(2, 3)}, r"ref_logps: was of shape \[2, 3\], must be \[2\]"),
        ({**NO_REFERENCE, "ref_hidden": torch.zeros(2, 4, 5), "ref_weight": torch.zeros(9, 5)},
         r"ref_hidden: was of shape \[2, 4, 5\], must be \[2, 3, 'H'\]"),
        ({**NO_REFERENCE, "ref_hidden": torch.zeros(2, 3, 5), "ref_weight": torch.zeros(10, 5)},
         r"ref_weight: was of shape \[10, 5\], must be \[9, H\]: policy and reference share one vocabulary"),
        ({"weight": torch.zeros(9, 5).bfloat16()}, r"weight: was of dtype torch.bfloat16, must be torch.float32"),
        ({"beta": 0.0}, r"beta: was 0.0, must be a finite number above 0"),
        ({"loss_type": "dpo"}, r"loss_type: was 'dpo', must be one of"),
        ({"label_smoothing": 0.7}, r"label_smoothing: was 0.7, must be at least 0 and below 0.5"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, r"label_smoothing: the loss 'ipo' does not use it"),
        ({"loss_type": "diffusion_dpo"}, r"loss_type: was 'diffusion_dpo', which takes denoising errors, must be"),
        ({"loss_type": "simpo", **NO_REFERENCE, "ref_hidden": torch.zeros(2, 3, 5)}, r"ref_weight: was None, must be"),
        ({"loss_type": [{"name": "sigmoid", "wieght": 1}]}, r"0.wieght: unknown key, .* did you mean 'weight'\?"),
        ({"temprature": 2.0}, r"temprature: the loss 'sigmoid' does not use it"),
        ({"backend": "fast"}, r"backend: was 'fast', must be one of"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_argument_its_value_and_what_it_should_be(changes, message):
    with pytest.raises(ValueError, match="^" + message):
        call(**changes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 3, 3), r"policy_logps: was of shape \[3\], must be \[2B\]"),
        ((4, 400, 4), r"ref_logps: was of shape \[400\], must be \[4\]"),
        ((4, 4, 2), r"counts: was of shape \[2\], must be \[4\]"),
    ],
)
def test_errors_of_pair_output_name_the_argument(sizes, message):
    policy, ref, counts = (torch.ones(size) for size in sizes)
    with pytest.raises(ValueError, match="^" + message):
        pair_output(policy, ref, counts.long())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_reaches_the_loss(bad):
    hidden = torch.zeros(2, 3, 5)
    hidden[0, 0] = bad
    out = call(hidden=hidden, weight=torch.ones(9, 5))
    assert out.loss.isnan()
    assert out.chosen_logps.isnan().all()
    assert not out.rejected_logps.isnan().any()


def test_a_reference_on_another_device_is_refused():
    hidden, labels = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="ref_logps: was on meta, must be on cpu"):
        fused_linear_dpo(hidden, torch.zeros(5, 4), labels, ref_logps=torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="counts: was on meta, must be on cpu"):
        pair_output(torch.zeros(2), torch.zeros(2), torch.ones(2, device="meta"))
