"""[prompt, chosen, rejected] in one row: the layout by hand, values and gradients of every family, and the probe."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdpo_kernels.integrations import attention_by_sequence, branched_flex, packed_attention, varlen_attention
from sdpo_kernels.integrations.attention_by_sequence import PACKED
from sdpo_kernels.integrations.causal_lm import attach_fused_head, disable_dropout
from sdpo_kernels.integrations.packed_attention import shares_prefixes, use_packed_attention, use_shared_prefixes
from sdpo_kernels.integrations.pieces import Piece, pieces
from sdpo_kernels.integrations.shared_prefix import SharedRow, common_prefix, shared_row
from tests.integrations.test_packed_attention import gradients, ready
from tests.integrations.tiny_models import FAMILIES, own_logps, tiny_model

NOT = -100


def pair(chosen: list[int], rejected: list[int], prompt: int) -> tuple[np.ndarray, ...]:
    """Input ids and targets of both sequences; the first `prompt` tokens are not scored."""
    found = []
    for ids in (chosen, rejected):
        targets = np.array(ids[1:])
        targets[: max(0, prompt - 1)] = NOT
        found += [np.array(ids[:-1]), targets]
    return tuple(found)


def test_layout_by_hand() -> None:
    row = shared_row([pair([5, 6, 7, 8, 9], [5, 6, 7, 3, 4, 2], 3), pair([4, 1], [8, 1, 1], 1)])
    # 5 6 7 are shared; 8 goes on with the chosen answer, 3 4 is the branch; the second pair shares nothing
    assert row.input_ids.tolist() == [5, 6, 7, 8, 3, 4, 4, 8, 1]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 0, 0, 1]

    # the hidden state of 7 predicts both 8 and 3
    assert list(zip(row.source.tolist(), row.targets.tolist(), strict=True)) == [
        (2, 8), (3, 9), (2, 3), (4, 4), (5, 2), (6, 1), (7, 1), (8, 1)
    ]  # fmt: skip
    # chosen 1, chosen 2, rejected 1, rejected 2
    assert row.expand.tolist() == [0, 1, 5, 2, 3, 4, 6, 7]
    assert row.segment.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]


def test_completion_tokens_that_both_answers_have_are_scored_once() -> None:
    row = shared_row([pair([5, 6, 7, 8], [5, 6, 7, 9, 3], 1)])
    assert row.input_ids.tolist() == [5, 6, 7, 9]  # 8 and 3 are predicted only
    assert row.position_ids.tolist() == [0, 1, 2, 3]
    assert list(zip(row.source.tolist(), row.targets.tolist(), strict=True)) == [(0, 6), (1, 7), (2, 8), (2, 9), (3, 3)]
    assert row.expand.tolist() == [0, 1, 2, 0, 1, 3, 4]

    # where one answer's prompt is longer, its shared tokens are scored for the other alone
    chosen, rejected = pair([5, 6, 7, 8], [5, 6, 7, 9], 1)[:2], pair([5, 6, 7, 8], [5, 6, 7, 9], 3)[2:]
    row = shared_row([(*chosen, *rejected)])
    assert row.targets.tolist() == [6, 7, 8, 9]
    assert row.expand.tolist() == [0, 1, 2, 3]


ids = st.lists(st.integers(0, 2), min_size=2, max_size=9)


@given(st.lists(st.tuples(ids, ids, st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4))
def test_every_layout_holds_what_the_sequences_are(drawn: list[Any]) -> None:
    """Each scored token's target, position, and the tokens that it follows in the row are those of its sequence."""
    pairs = [(*pair(a, a, p)[:2], *pair(b, b, q)[2:]) for a, b, p, q in drawn]
    row = shared_row(pairs)
    wanted = [one[side : side + 2] for side in (0, 2) for one in pairs]

    at = 0
    for number, (inputs, targets) in enumerate(wanted):
        scored = np.flatnonzero(targets != NOT)
        mine = row.expand[at : at + len(scored)]
        at += len(scored)
        assert row.targets[mine].tolist() == targets[scored].tolist()
        assert row.position_ids[row.source[mine]].tolist() == scored.tolist()
        assert (row.segment == number).sum() == len(scored)
        for place, position in zip(row.source[mine], scored, strict=True):
            assert seen(row, int(place)) == inputs[: position + 1].tolist()
    assert at == len(row.expand)

    # nothing is scored twice, and no more tokens go through the model than the sequences have
    assert len({*zip(row.source.tolist(), row.targets.tolist(), strict=True)}) == len(row.source)
    assert len(row.input_ids) == sum(len(c) + len(r) - common_prefix(c, r) for c, _, r, _ in pairs)


def seen(row: SharedRow, place: int) -> list[int]:
    """The tokens that the place attends to, in order of position."""
    return row.input_ids[rows_seen(pieces(torch.from_numpy(row.position_ids)[None]), place)].tolist()


# prompts of 6, 1 and 3 tokens, longer than the window of the sliding families (4) and shorter
PAIRS = [
    pair([5, 9, 20, 31, 7, 8, 40, 41, 42, 43, 44], [5, 9, 20, 31, 7, 8, 50, 51, 52, 53, 54, 55, 56], 6),
    pair([12, 30, 31, 32], [12, 40, 41], 1),
    pair([15, 16, 17, 20, 21, 22], [15, 16, 17, 20, 30, 31, 32, 33], 3),
]


def shared_logps(model: Any, pairs: list[Any] = PAIRS) -> Tensor:
    row = SharedRow(*(torch.from_numpy(part).to(model.device) for part in shared_row(pairs)))
    out = model(
        input_ids=row.input_ids[None], position_ids=row.position_ids[None], logp_targets=row.targets,
        logp_source=row.source,
    )  # fmt: skip
    return out.logps[row.expand]


def one_by_one(model: Any, pairs: list[Any] = PAIRS) -> Tensor:
    """The same tokens, each sequence alone, from the model's own logits."""
    found = []
    for side in (0, 2):
        for one in pairs:
            inputs, targets = (torch.from_numpy(part) for part in one[side : side + 2])
            found.append(own_logps(model, {"input_ids": inputs[None]}, targets[None]))
    return torch.cat(found)


def branching(family: str, **overrides: Any) -> Any:
    model = ready(family, **overrides)
    assert use_shared_prefixes(model) is None
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_as_near_to_float64_as_unshared(family: str) -> None:
    plain = tiny_model(family)
    disable_dropout(plain)
    truth = one_by_one(copy.deepcopy(plain).double())
    exact = gradients_of(copy.deepcopy(plain).double())
    unshared = ready(family)
    own = packed_logps(unshared)
    model = branching(family)
    logps = shared_logps(model)

    scale = float(truth.detach().abs().max())
    assert float((logps - own).detach().abs().max()) <= 1e-6 * scale
    assert float((logps.double() - truth).detach().abs().max()) <= 3e-6 * scale

    error = float((gradients(model, logps) - exact).norm())
    unshared_error = float((gradients(unshared, own) - exact).norm())
    assert error <= 1.25 * unshared_error


def gradients_of(model: Any) -> Tensor:
    return gradients(model, one_by_one(model))


def packed_logps(model: Any) -> Tensor:
    """The unshared layout: all sequences end to end."""
    sequences = [(one[side], one[side + 1]) for side in (0, 2) for one in PAIRS]
    joined = (np.concatenate(parts) for parts in zip(*sequences, strict=True))
    ids_, targets = (torch.from_numpy(part).to(model.device) for part in joined)
    positions = torch.cat([torch.arange(len(s)) for s, _ in sequences]).to(model.device)
    out = model(input_ids=ids_[None], position_ids=positions[None], logp_targets=targets[None])
    return out.logps[targets != NOT]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_under_bf16_autocast_it_is_as_near_to_float32_as_unshared(family: str) -> None:
    model, unshared = branching(family), ready(family)
    truth = packed_logps(unshared).detach()
    with torch.autocast("cpu", torch.bfloat16):
        own_error = (packed_logps(unshared) - truth).detach().abs().mean()
        error = (shared_logps(model) - truth).detach().abs().mean()
        assert torch.isfinite(gradients(model, shared_logps(model))).all()
    assert float(own_error) > 1e-3
    assert float(error) <= 1.25 * float(own_error)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_pair_scores_the_same_whatever_it_is_packed_with(family: str) -> None:
    model = branching(family)
    with torch.no_grad():
        together = shared_logps(model)
        alone = [shared_logps(model, [one]) for one in PAIRS]
    halves = [[], []]
    for one, found in zip(PAIRS, alone, strict=True):
        count = int((one[1] != NOT).sum())
        halves[0].append(found[:count])
        halves[1].append(found[count:])
    assert float((together - torch.cat([*halves[0], *halves[1]])).abs().max()) <= 3e-7 * float(together.abs().max())


def test_gradient_checkpointing_changes_nothing() -> None:
    model = branching("llama")
    expected = gradients(model, shared_logps(model))
    model.gradient_checkpointing_enable()
    assert torch.equal(gradients(model, shared_logps(model)), expected)


def test_the_probe_sees_an_attention_that_reads_positions_as_transformers_does(monkeypatch) -> None:
    """Branches as sequences of their own, and branches that see everything before them: both are refused."""
    model = ready("llama")
    monkeypatch.setattr(attention_by_sequence, "_pieces", lambda ids, query: [Piece(p.length, 0) for p in pieces(ids)])
    reason = use_shared_prefixes(model)
    assert reason is not None
    assert "scores a branch differently" in reason
    assert model.config._attn_implementation == PACKED

    monkeypatch.setattr(attention_by_sequence, "_pieces", lambda ids, query: [Piece(query.shape[2], 0)])
    reason = use_shared_prefixes(model)
    assert reason is not None
    assert "another first answer changes the second one's hidden states" in reason


def test_what_cannot_share_is_refused_with_its_reason(monkeypatch) -> None:
    experts = attach_fused_head(tiny_model("mixtral", output_router_logits=True))
    assert use_packed_attention(experts) is None
    assert "auxiliary loss of its router" in str(use_shared_prefixes(experts))
    model = ready("mixtral")
    assert use_shared_prefixes(model) is None
    assert shares_prefixes(model)
    model.config.output_router_logits = True  # afterwards
    assert not shares_prefixes(model)

    model = ready("llama")
    assert "flex_attention attention, which was asked for" in str(use_shared_prefixes(model, only="flex_attention"))
    assert use_shared_prefixes(model, only=PACKED) is None

    # as on CUDA where a faster attention was found and nothing serves branches in one call
    model.set_attn_implementation("sdpa")
    reason = "no attention on cpu serves branches of a LlamaForCausalLM in one call"
    monkeypatch.setattr(varlen_attention, "_kernel", lambda: print)
    assert use_shared_prefixes(model) == reason
    monkeypatch.setattr(varlen_attention, "_kernel", lambda: None)  # of an older torch
    assert use_shared_prefixes(model) == f"{reason}; torch 2.13 has one for most models"
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(packed_attention, "_one_call_serves", lambda base, parameter: True)
    assert use_shared_prefixes(model) is None
    assert model.config._attn_implementation == PACKED


def test_positions_changed_in_place_are_read_again() -> None:
    model = branching("llama").eval()
    positions = torch.arange(6)[None]
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10]]), "position_ids": positions}
    with torch.no_grad():
        whole = model(**inputs).logits
        positions[0, 3:] = torch.arange(3)
        split = model(**inputs).logits
        alone = model(input_ids=inputs["input_ids"][:, 3:]).logits
    assert not torch.allclose(whole[:, 3:], split[:, 3:], atol=1e-3)
    torch.testing.assert_close(split[:, 3:], alone)


def flash(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """FlashAttention's rule in plain torch: the causal mask ends with the last query and the last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == tuple(int(cu.diff().max()) for cu in (cu_seq_q, cu_seq_k))
    out = []
    for number in range(len(cu_seq_q) - 1):
        one = q[cu_seq_q[number] : cu_seq_q[number + 1]].transpose(0, 1)
        keys, values = (t[cu_seq_k[number] : cu_seq_k[number + 1]].transpose(0, 1) for t in (k, v))
        places = torch.arange(one.shape[1])[:, None] + keys.shape[1] - one.shape[1]
        distance = places - torch.arange(keys.shape[1])
        left, right = window_size
        assert right == 0
        mask = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        found = torch.nn.functional.scaled_dot_product_attention(
            one[None], keys[None], values[None], mask, scale=scale, enable_gqa=enable_gqa
        )
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3"])
def test_one_call_for_all_pieces(family: str, monkeypatch) -> None:
    """What CUDA gets, with FlashAttention in plain torch: the same values and gradients as piece by piece."""
    model = branching(family)
    expected = shared_logps(model)
    expected_gradients = gradients(model, expected)
    packed = packed_logps(model)
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(args[3]) - 1)
        return flash(*args, **kwargs)

    monkeypatch.setattr(varlen_attention, "serves", lambda *args, special, **kwargs: not special)
    monkeypatch.setattr(varlen_attention, "_kernel", lambda: counted)
    assert use_shared_prefixes(model) is None
    calls.clear()
    found = shared_logps(model)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        gradients(model, found), expected_gradients, rtol=1e-4, atol=1e-5 * float(expected_gradients.abs().max())
    )
    assert calls == [6, 6]  # two layers; three pairs with two pieces each

    # rows without branches are left to what serves them today
    calls.clear()
    assert torch.equal(packed_logps(model), packed)
    assert not calls


def rows_seen(found: list[Piece], place: int) -> list[int]:
    """The rows that a row attends to, in plain loops."""
    begin = trunk = 0
    for piece in found:
        if not piece.shared:
            trunk = begin
        if place < begin + piece.length:
            return [*range(trunk, trunk + piece.shared), *range(begin, place + 1)]
        begin += piece.length
    raise AssertionError(place)


def test_flash_attention_serves_half_precision_on_recent_gpus_alone(monkeypatch) -> None:
    query = torch.empty(1, 2, 3, 8, dtype=torch.bfloat16)
    assert not varlen_attention.serves(query, query, 0.0, special=False)

    class OnCuda:
        is_cuda, dtype, shape, device = True, torch.bfloat16, (1, 2, 3, 64), torch.device("cuda")

    like: Any = OnCuda()
    monkeypatch.setattr(varlen_attention, "_is_recent", lambda device: False)
    assert not varlen_attention.serves(like, like, 0.0, special=False)
    monkeypatch.setattr(varlen_attention, "_is_recent", lambda device: True)
    monkeypatch.setattr(varlen_attention, "_kernel", lambda: None)  # of a torch without windows or grouped heads
    assert not varlen_attention.serves(like, like, 0.0, special=False)
    monkeypatch.setattr(varlen_attention, "_kernel", lambda: print)
    assert varlen_attention.serves(like, like, 0.0, special=False)
    assert not varlen_attention.serves(like, like, 0.1, special=False)
    assert not varlen_attention.serves(like, like, 0.0, special=True)
    like.shape = (1, 2, 3, 20)
    assert not varlen_attention.serves(like, like, 0.0, special=False)

    # float32 queries under autocast are computed in its dtype
    like.dtype, like.shape = torch.float32, (1, 2, 3, 64)
    assert not varlen_attention.serves(like, like, 0.0, special=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen_attention.dtype_of(torch.empty(1)) == torch.bfloat16

    # FlexAttention serves a softcap, in any precision
    assert branched_flex.serves(like, 0.0, softcap=2.0, sinks=None)
    assert not branched_flex.serves(like, 0.0, softcap=None, sinks=None)
    assert not branched_flex.serves(query, 0.0, softcap=2.0, sinks=None)


def test_under_autocast_the_call_gets_one_dtype(monkeypatch) -> None:
    """Rotary embeddings leave float32 queries and keys beside bfloat16 values."""
    model = branching("llama")
    dtypes = []

    def noting(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtypes.append({q.dtype, k.dtype, v.dtype})
        return flash(q, k, v, *args, **kwargs)

    with torch.autocast("cpu", torch.bfloat16):
        expected = shared_logps(model)
        monkeypatch.setattr(varlen_attention, "serves", lambda *args, special, **kwargs: not special)
        monkeypatch.setattr(varlen_attention, "_kernel", lambda: noting)
        found = shared_logps(model)
    assert dtypes == [{torch.bfloat16}] * 2
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_layout_read_in_inference_mode_serves_training(monkeypatch) -> None:
    model = branching("llama")
    monkeypatch.setattr(varlen_attention, "serves", lambda *args, special, **kwargs: not special)
    monkeypatch.setattr(varlen_attention, "_kernel", lambda: flash)
    varlen_attention.layout_of.cache_clear()
    with torch.inference_mode():
        shared_logps(model)
    assert torch.isfinite(gradients(model, shared_logps(model))).all()


def test_the_probe_sees_a_trunk_that_never_moves_on(monkeypatch) -> None:
    """Branches that continue the row's first sequence instead of the last one."""
    model = ready("llama")
    monkeypatch.setattr(varlen_attention, "serves", lambda *args, special, **kwargs: not special)
    monkeypatch.setattr(varlen_attention, "_kernel", lambda: flash)
    right = varlen_attention.layout_of

    def first_trunk(found: tuple[Piece, ...], device: torch.device) -> Any:
        layout = right(found, device)
        at, keys = 0, layout.keys.clone()
        for piece in found:
            if piece.shared:
                keys[at : at + piece.shared] = torch.arange(piece.shared)
            at += piece.length + piece.shared
        return layout._replace(keys=keys)

    monkeypatch.setattr(varlen_attention, "layout_of", first_trunk)
    assert "another first answer changes the second one's hidden states" in str(use_shared_prefixes(model))


def test_a_source_of_another_length_is_refused() -> None:
    model = branching("llama")
    row = SharedRow(*(torch.from_numpy(part) for part in shared_row(PAIRS)))
    inputs = {"input_ids": row.input_ids[None], "position_ids": row.position_ids[None]}
    with pytest.raises(ValueError, match="logp_targets: was of shape"):
        model(**inputs, logp_targets=row.targets, logp_source=row.source[1:])
    with pytest.raises(ValueError, match="logp_source: was given without logp_targets"):
        model(**inputs, logp_source=row.source)
