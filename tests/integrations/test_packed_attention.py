"""Packed rows equal padded batches, sequences never see each other, and unsupported models are rejected."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from sdpo_kernels.integrations import attention_by_sequence, packed_attention
from sdpo_kernels.integrations.attention_by_sequence import PACKED
from sdpo_kernels.integrations.causal_lm import attach_fused_head, disable_dropout
from sdpo_kernels.integrations.packed_attention import use_packed_attention
from sdpo_kernels.integrations.pieces import Piece, pieces
from tests.integrations.tiny_models import FAMILIES, own_logps, packed, padded, sequences, shifted, tiny_model

LENGTHS = (9, 5, 12, 7)  # the window of the sliding families is 4


def ready(family: str, **overrides: Any) -> Any:
    """A model with the fused head and packed attention, without dropout."""
    model = tiny_model(family, **overrides)
    disable_dropout(model)
    attach_fused_head(model)
    assert use_packed_attention(model) is None
    return model


def packed_logps(model: Any, ids: list[Tensor]) -> Tensor:
    batch = packed(ids)
    return model(**batch).logps[batch["logp_targets"][0] != -100]


def gradients(model: Any, logps: Tensor) -> Tensor:
    """All gradients of a scalar that weights every token differently, as one vector in float64."""
    weights = torch.linspace(-1, 1, logps.numel(), dtype=torch.float64)
    parameters = list(model.parameters())
    grads = torch.autograd.grad((logps.double() * weights).sum(), parameters, allow_unused=True)
    pairs = zip(parameters, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).double().flatten() for p, g in pairs])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family: str) -> None:
    """Log-probs and gradients are as near to float64 as those of the padded batch with the model's own attention."""
    ids = sequences(*LENGTHS)
    plain = tiny_model(family)
    disable_dropout(plain)
    exact = copy.deepcopy(plain).double()
    truth = torch.cat([own_logps(exact, {"input_ids": s[None]}, shifted(s)[None]) for s in ids])
    true_gradient = gradients(exact, truth)
    reference = own_logps(plain, *padded(ids))
    reference_gradient = gradients(plain, reference)
    model = ready(family)
    logps = packed_logps(model, ids)
    gradient = gradients(model, logps)

    truth, reference, logps = truth.detach(), reference.detach(), logps.detach()
    own_error = float((reference - truth).abs().max())
    assert own_error < 1e-4  # the padded reference is accurate
    assert float((logps - truth).abs().max()) <= 3 * own_error + 2e-6
    scale = float(true_gradient.norm())
    assert (
        float((gradient - true_gradient).norm())
        <= 3 * float((reference_gradient - true_gradient).norm()) + 1e-6 * scale
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_score_does_not_depend_on_neighbours(family: str) -> None:
    model = ready(family)
    ids = sequences(*LENGTHS)
    with torch.no_grad():
        together = packed_logps(model, ids)
        reversed_order = packed_logps(model, ids[::-1]).split([len(s) - 2 for s in ids[::-1]])
        alone = [packed_logps(model, [s]) for s in ids]
    scale = float(together.abs().max())
    for other in (torch.cat(alone), torch.cat(reversed_order[::-1])):
        assert float((together - other).abs().max()) <= 3e-7 * scale


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_bf16_autocast(family: str) -> None:
    """Under autocast, packed is as near to float32 as padded, and what is packed together still makes no difference."""
    ids = sequences(*LENGTHS)
    plain = tiny_model(family)
    disable_dropout(plain)
    truth = own_logps(plain, *padded(ids)).detach()
    model = ready(family)
    with torch.autocast("cpu", torch.bfloat16):
        reference = own_logps(plain, *padded(ids))
        logps = packed_logps(model, ids)
        alone = torch.cat([packed_logps(model, [s]) for s in ids])
    assert logps.dtype == torch.float32
    own_error = float((reference - truth).abs().mean())
    assert own_error > 1e-3  # bf16 was really used
    assert float((logps - truth).abs().mean()) <= 2 * own_error
    assert float((logps - alone).abs().max()) <= 1e-5 * float(truth.abs().max())
    assert torch.isfinite(gradients(model, logps)).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("length", [1, 3, 64, 65, 130])
@pytest.mark.parametrize("window", [None, 5, 70, 600])
def test_attention_of_one_sequence(length: int, window: int | None, softcap: float | None) -> None:
    """The fused kernel and (with a softcap) blocks, at and off the edges of both, against a few lines of float64."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, 4, length, 8), (1, 2, length, 8), (1, 2, length, 6)]
    q, k, v = (torch.randn(s, generator=generator, requires_grad=True) for s in shapes)
    direction = torch.randn(1, length, 4, 6, generator=generator)
    out, _ = attention_by_sequence.packed_attention(
        torch.nn.Identity(),
        q,
        k,
        v,
        None,
        sliding_window=window,
        softcap=softcap,
        position_ids=torch.arange(length)[None],
    )
    got = torch.autograd.grad((out * direction).sum(), (q, k, v))
    q64, k64, v64 = (t.detach().double().requires_grad_() for t in (q, k, v))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    scores = q64 @ k64.repeat_interleave(2, 1).mT / 8**0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    exact = (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v64.repeat_interleave(2, 1)).transpose(1, 2)
    expected = torch.autograd.grad((exact * direction).sum(), (q64, k64, v64))
    for a, b in zip((out, *got), (exact, *expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("shared", "own"), [(1, 1), (3, 7), (64, 65), (70, 300), (130, 257)])
@pytest.mark.parametrize("window", [None, 5, 70])
def test_attention_of_a_branch(shared: int, own: int, window: int | None, softcap: float | None, half: bool) -> None:
    """A branch gets what the whole sequence gets: output, and gradients of trunk and branch, against the same alone."""
    generator = torch.Generator().manual_seed(shared)
    beside = 4  # the trunk's own continuation, and a neighbour behind the branch
    dtype = torch.bfloat16 if half else torch.float32

    def draw(rows: int) -> list[Tensor]:
        shapes = [(1, 4, rows, 8), (1, 2, rows, 8), (1, 2, rows, 6)]
        return [torch.randn(s, generator=generator).to(dtype) for s in shapes]

    def attend(tensors: list[Tensor], positions: Tensor) -> Tensor:
        return attention_by_sequence.packed_attention(
            torch.nn.Identity(), *tensors, None, sliding_window=window, softcap=softcap, position_ids=positions[None]
        )[0]

    parts = [draw(shared), draw(beside), draw(own), draw(beside)]
    direction = torch.randn(1, own, 4, 6, generator=generator).to(dtype)

    # the sequence alone: trunk and branch
    alone = [torch.cat([a, b], 2).requires_grad_() for a, b in zip(parts[0], parts[2], strict=True)]
    expected = attend(alone, torch.arange(shared + own))[:, shared:]
    wanted = torch.autograd.grad((expected * direction).sum(), alone)

    row = [torch.cat(tensors, 2).requires_grad_() for tensors in zip(*parts, strict=True)]
    lengths = [shared + beside, own, beside]
    firsts = [0, shared, 0]
    positions = torch.cat([torch.arange(n) + first for n, first in zip(lengths, firsts, strict=True)])
    found = attend(row, positions)[:, shared + beside :][:, :own]
    got = torch.autograd.grad((found * direction).sum(), row)

    rtol = 2e-2 if half else 1e-5
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    for gradient, own_gradient in zip(got, wanted, strict=True):
        trunk, other, branch, neighbour = gradient.split([shared, beside, own, beside], 2)
        torch.testing.assert_close(torch.cat([trunk, branch], 2), own_gradient, rtol=rtol, atol=4 * rtol)
        assert not other.any()
        assert not neighbour.any()


def test_bf16_in_blocks_is_nearer_to_float32_than_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 150, 8, generator=generator).bfloat16() for heads in (4, 2, 2))
    where = {"position_ids": torch.arange(150)[None]}

    def attend(*tensors: Tensor) -> Tensor:
        return attention_by_sequence.packed_attention(torch.nn.Identity(), *tensors, None, **where)[0].float()

    exact = attend(q.float(), k.float(), v.float())
    blocks = float((attend(q, k, v) - exact).norm())
    monkeypatch.setattr(attention_by_sequence, "BLOCKS_UP_TO", 0)
    fused = float((attend(q, k, v) - exact).norm())
    assert 0 < blocks < fused


def test_gradient_checkpointing_changes_nothing() -> None:
    ids = sequences(*LENGTHS)
    model = ready("llama")
    expected = gradients(model, packed_logps(model, ids))
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert torch.equal(gradients(model, packed_logps(model, ids)), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2", "gpt_oss"])
def test_other_batches_still_get_their_mask(family: str) -> None:
    """Left- and right-padded batches and generation with a cache give what eager attention gives."""
    plain, model = tiny_model(family).eval(), ready(family).eval()
    rows = torch.stack(sequences(9, 9))
    left, right = torch.ones(2, 2, 9, dtype=torch.long).unbind()
    left[1, :4] = 0
    right[1, 5:] = 0
    for mask in (left, right):
        with torch.no_grad():
            ours, own = (m(input_ids=rows, attention_mask=mask).logits for m in (model, plain))
        assert float((ours - own)[mask.bool()].abs().max()) <= 2e-5
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(m.generate(input_ids=rows, attention_mask=left, **options) for m in (model, plain)))


def test_a_packed_row_has_no_mask_and_a_cache_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready("llama").eval()
    masks: list[Tensor | None] = []
    attend = attention_by_sequence.packed_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        masks.append(args[4])
        return attend(*args, **kwargs)

    monkeypatch.setitem(tf.AttentionInterface._global_mapping, PACKED, spy)
    batch = packed(sequences(*LENGTHS))
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        without = model(**inputs, use_cache=False).logits
        with_cache = model(**inputs, use_cache=True).logits
        with_ones = model(**inputs, attention_mask=torch.ones_like(batch["input_ids"]), use_cache=False).logits
    assert masks == [None] * 6  # two layers, three times
    assert torch.equal(without, with_cache)
    assert torch.equal(without, with_ones)


def test_pieces_of_a_row() -> None:
    assert pieces(torch.tensor([[0, 1, 2, 0, 0, 1]])) == [Piece(3, 0), Piece(1, 0), Piece(2, 0)]
    assert pieces(torch.tensor([[0]])) == [Piece(1, 0)]
    assert pieces(torch.tensor([[0, 1, 2], [0, 1, 2]])) == [Piece(3, 0)]
    assert pieces(torch.tensor([[3, 4]])) == [Piece(2, 0)]

    # branches: two of one sequence, and one that continues all of another
    branched = torch.tensor([[0, 1, 2, 1, 2, 3, 2, 0, 1, 0, 1, 2, 1]])
    assert pieces(branched) == [Piece(3, 0), Piece(3, 1), Piece(1, 2), Piece(2, 0), Piece(3, 0), Piece(1, 1)]

    with pytest.raises(ValueError, match="position_ids: was of shape"):
        pieces(torch.zeros(3, 1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="position_ids: was 3 at row 2, after a sequence of 2 positions"):
        pieces(torch.tensor([[0, 1, 3, 4]]))


def test_two_packed_rows_are_an_error() -> None:
    model = ready("llama")
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    with pytest.raises(ValueError, match="input_ids: was of 2 rows"):
        model(input_ids=torch.ones(2, 4, dtype=torch.long), position_ids=positions)


def small(kind: str, **options: Any) -> Any:
    common = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(getattr(tf, kind)(**common, **heads, **options))


STATEFUL = {
    "qwen3_next": lambda: small(
        "Qwen3NextConfig",
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "mamba": lambda: small("MambaConfig", state_size=8),
    "rwkv": lambda: small("RwkvConfig", attention_hidden_size=32),
    "lfm2": lambda: small("Lfm2Config", layer_types=["conv", "full_attention"]),
}


@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_stateful_layers_are_refused(name: str) -> None:
    reason = use_packed_attention(STATEFUL[name]())
    assert reason is not None
    assert "packed sequence" in reason


@pytest.mark.parametrize("name", ["qwen3_next", "mamba", "lfm2"])
def test_the_probe_alone_sees_the_leak(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stateful layer that is in no list is found by its behaviour."""
    monkeypatch.setattr(packed_attention, "_stateful_layer", lambda base: None)
    model = STATEFUL[name]()
    before = model.config._attn_implementation
    reason = use_packed_attention(model)
    assert reason is not None
    assert "leak into each other" in reason
    assert model.config._attn_implementation == before
    assert model.training == STATEFUL[name]().training


def test_the_probe_sees_an_attention_over_the_whole_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_by_sequence, "_pieces", lambda position_ids, query: [Piece(query.shape[2], 0)])
    reason = use_packed_attention(tiny_model("llama"))
    assert reason is not None
    assert "leak into each other" in reason


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        # its layers slide only by their mask, further than a short probe could see
        ("PhimoeConfig", {"num_local_experts": 4, "sliding_window": 32}, "masks for windows of"),
        ("FalconConfig", {"alibi": False, "bos_token_id": 1, "eos_token_id": 2}, "AttentionInterface"),
        ("GPTBigCodeConfig", {"bos_token_id": 1, "eos_token_id": 2}, "position_ids"),
        ("Llama4TextConfig", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}, "chunked_attention"),
    ],
)
def test_attention_that_cannot_be_switched_is_refused(kind: str, options: dict[str, Any], says: str) -> None:
    if kind == "GPTBigCodeConfig":
        torch.manual_seed(0)
        model = tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, **options))
    else:
        model = small(kind, **options)
    before = model.config._attn_implementation
    reason = use_packed_attention(model)
    assert reason is not None
    assert says in reason
    assert model.config._attn_implementation == before


def test_packed_attention_is_not_saved(tmp_path: Any) -> None:
    model = ready("llama")
    model.save_pretrained(tmp_path)
    assert "sdpo" not in (tmp_path / "config.json").read_text()
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
