"""DPO in a custom training loop, against the model's own logits and autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from sdpo_kernels.integrations.causal_lm import attach_fused_head, disable_dropout
from sdpo_kernels.integrations.dpo_step import dpo_step, score_pairs
from sdpo_kernels.integrations.packed_attention import use_packed_attention, use_shared_prefixes
from tests.integrations.tiny_models import CONFIGS, VOCAB, tiny_model


def batch(seed: int = 0, pairs: int = 2, length: int = 9):
    """Right-padded sequences of different lengths; the first three tokens are prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2 * pairs, length), generator=generator)
    lengths = torch.randint(5, length + 1, (2 * pairs,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(length) < 3), -100)
    return ids, labels, mask


def own_sums(model, ids, labels, mask):
    """The same from full logits, in float64."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].double()
    targets = labels[:, 1:]
    found = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (found * (targets != -100)).sum(1)


@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family):
    model = tiny_model(family)
    disable_dropout(model)
    twin = copy.deepcopy(model)
    attach_fused_head(model)
    ids, labels, mask = batch()
    ref = score_pairs(model, ids, labels, mask)
    torch.testing.assert_close(ref.double(), own_sums(twin, ids, labels, mask).detach(), rtol=1e-5, atol=1e-5)
    ref = ref + torch.linspace(-1, 1, len(ref))  # a reference that is not the policy
    out = dpo_step(model, ids, labels, mask, ref_logps=ref, beta=0.5)
    out.loss.backward()
    chosen, rejected = (own_sums(twin, ids, labels, mask) - ref).chunk(2)
    loss = -F.logsigmoid(0.5 * (chosen - rejected)).mean()
    loss.backward()
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    gradients = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        expected = gradients[name].grad
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=2e-3, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("loss", "options"),
    [("simpo", {"simpo_gamma": 0.3}), ("ld_dpo", {"ld_alpha": 0.3}), ("wpo", {}), ("dpop", {"dpop_lambda": 5.0})],
)
def test_other_losses_train(loss, options):
    model = attach_fused_head(tiny_model("llama"))
    ids, labels, mask = batch()
    ref = None if loss == "simpo" else score_pairs(model, ids, labels, mask, ld_alpha=options.get("ld_alpha"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        out = dpo_step(model, ids, labels, mask, ref_logps=ref, beta=1.0, loss_type=loss, **options)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]


def test_the_reference_of_an_adapter_is_its_base():
    model = attach_fused_head(tiny_model("llama"))
    ids, labels, mask = batch()
    before = score_pairs(model, ids, labels, mask)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert not torch.allclose(score_pairs(adapted, ids, labels, mask), before)
    assert torch.equal(score_pairs(adapted, ids, labels, mask, without_adapter=True), before)


def test_wrong_calls_are_refused():
    model = tiny_model("llama")
    ids, labels, mask = batch()
    with pytest.raises(ValueError, match="model: was a LlamaForCausalLM without a fused head"):
        score_pairs(model, ids, labels, mask)
    attach_fused_head(model)
    with pytest.raises(ValueError, match="ref_logps: was None, must be given: the loss 'sigmoid'"):
        dpo_step(model, ids, labels, mask)
    with pytest.raises(ValueError, match=r"input_ids: was a list, must be an int64 tensor \[2B, T\]"):
        score_pairs(model, ids.tolist(), labels, mask)
    with pytest.raises(ValueError, match=r"labels: was a list, must be an int64 tensor"):
        dpo_step(model, ids, labels.tolist(), mask, ref_logps=torch.zeros(4))
    with pytest.raises(ValueError, match=r"attention_mask: was a list, must be a tensor \[2B, T\]"):
        score_pairs(model, ids, labels, mask.tolist())
    with pytest.raises(ValueError, match=r"ref_logps: was a list, must be a tensor \[2B\]"):
        dpo_step(model, ids, labels, mask, ref_logps=[0.0] * 4)
    with pytest.raises(ValueError, match=r"input_ids: was of shape \[3, 9\], must be \[2B, T\]"):
        score_pairs(model, ids[:3], labels[:3], mask[:3])
    with pytest.raises(ValueError, match=r"labels: was of shape \[4, 8\], must be \[4, 9\]"):
        score_pairs(model, ids, labels[:, 1:], mask)
    with pytest.raises(ValueError, match="labels: sequence 1 has no scored token"):
        score_pairs(model, ids, labels.index_fill(0, torch.tensor([1]), -100), mask)


def test_training_mode_is_restored():
    model = attach_fused_head(tiny_model("llama")).train()
    score_pairs(model, *batch())
    assert model.training


def pairs_with_prompts(left: bool = False):
    """Three pairs whose answers begin alike: prompts of 5, 2 and 0 tokens, and one first answer token in common."""
    generator = torch.Generator().manual_seed(3)
    sequences, labels = [[], []], [[], []]
    for prompt, lengths in ((5, (3, 6)), (2, (4, 2)), (0, (5, 5))):
        shared = torch.randint(3, VOCAB, (prompt + 1,), generator=generator)
        for side, length in enumerate(lengths):
            ids = torch.cat([shared, torch.randint(3, VOCAB, (length,), generator=generator)])
            sequences[side].append(ids)
            labels[side].append(ids.clone().index_fill_(0, torch.arange(prompt), -100))
    longest = max(len(ids) for ids in sequences[0] + sequences[1])

    def padded(rows, value):
        sides = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
        return torch.stack([F.pad(row, side, value=value) for row, side in zip(rows, sides, strict=True)])

    ids, labels = sequences[0] + sequences[1], labels[0] + labels[1]
    return padded(ids, 0), padded(labels, -100), padded([torch.ones_like(row) for row in ids], 0)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("loss", "options"), [("sigmoid", {}), ("wpo", {}), ("ld_dpo", {"ld_alpha": 0.3}), ("cpo", {"cpo_alpha": 0.5})]
)
def test_a_shared_prompt_changes_nothing_but_rounding(loss, options, left):
    batch = pairs_with_prompts(left)
    alpha = options.get("ld_alpha")
    results = []
    for sharing in (False, True):
        model = attach_fused_head(tiny_model("llama"))
        assert use_packed_attention(model) is None
        assert use_shared_prefixes(model) is None
        ref = score_pairs(model, *batch, ld_alpha=alpha, prefix_sharing=sharing)
        ref = ref + torch.linspace(-1, 1, len(ref))
        out = dpo_step(model, *batch, ref_logps=ref, beta=0.5, loss_type=loss, prefix_sharing=sharing, **options)
        out.loss.backward()
        results.append((ref, out, [parameter.grad for parameter in model.parameters()]))

    (ref, out, gradients), (shared_ref, shared_out, shared_gradients) = results
    torch.testing.assert_close(shared_ref, ref, rtol=1e-6, atol=1e-6)
    for one, other in zip(shared_out, out, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(shared_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_the_first_token_of_a_sequence_is_not_scored_from_padding():
    """Without a prompt it has a label, and nothing before it but padding."""
    model = attach_fused_head(tiny_model("llama"))
    right, left = (score_pairs(model, *pairs_with_prompts(side)) for side in (False, True))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharing", [False, True])
def test_labels_on_padding_are_not_scored(sharing):
    """As with `labels = input_ids.clone()`: the same as with −100 there."""
    model = attach_fused_head(tiny_model("llama"))
    assert use_packed_attention(model) is None
    assert use_shared_prefixes(model) is None
    ids, _, mask = pairs_with_prompts()
    found = score_pairs(model, ids, ids, mask, prefix_sharing=sharing)
    wanted = score_pairs(model, ids, ids.masked_fill(mask == 0, -100), mask)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)

    mask[0, 2] = 0
    if sharing:
        with pytest.raises(ValueError, match="attention_mask: sequence 0 had padding between its tokens"):
            score_pairs(model, ids, ids, mask, prefix_sharing=True)


def test_the_prompt_goes_through_the_model_once():
    ids, labels, mask = pairs_with_prompts()
    model = attach_fused_head(tiny_model("llama"))
    assert use_packed_attention(model) is None
    assert use_shared_prefixes(model) is None
    seen = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    score_pairs(model, ids, labels, mask, prefix_sharing=True)
    # both sequences without their last tokens, less what is shared: 6, 3 and 1
    assert seen == [(1, int(mask.sum()) - 6 - 6 - 3 - 1)]


def test_sharing_needs_a_model_that_is_ready_for_it():
    batch = pairs_with_prompts()
    model = attach_fused_head(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"prefix_sharing: was True for a LlamaForCausalLM that is not ready for it"):
        score_pairs(model, *batch, prefix_sharing=True)
    assert use_packed_attention(model) is None
    assert use_shared_prefixes(model) is None
    score_pairs(model, *batch, prefix_sharing=True)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="call use_packed_attention"):
        dpo_step(model, *batch, loss_type="simpo", prefix_sharing=True)
