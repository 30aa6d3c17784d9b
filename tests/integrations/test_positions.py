"""Positions: how many a language model has, and the same log-probs whichever side of a batch is padded."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from sdpo_kernels.integrations.causal_lm import attach_fused_head, disable_dropout
from sdpo_kernels.integrations.dpo_step import dpo_step, score_pairs
from sdpo_kernels.integrations.packed_attention import use_packed_attention
from sdpo_kernels.integrations.positions import first_position, padded_positions, position_limit
from tests.integrations.tiny_models import CONFIGS, sequences, tiny_model

MOST = 24
_PLAIN = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
_SIZED = _PLAIN | {"intermediate_size": 48, "max_position_embeddings": MOST}
_GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MOST}
_DECODER = {"vocab_size": 61, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
_DECODER |= {"encoder_layers": 1, "encoder_attention_heads": 4, "max_position_embeddings": MOST, "pad_token_id": 1}

OTHERS = {
    "opt": ("OPT", _PLAIN | {"ffn_dim": 48, "max_position_embeddings": MOST, "word_embed_proj_dim": 32}),
    "biogpt": ("BioGpt", _SIZED),
    "gpt_bigcode": ("GPTBigCode", _GPT),
    "gpt_neo": (
        "GPTNeo",
        {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": MOST}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gptj": ("GPTJ", _GPT | {"rotary_dim": 4}),
    "codegen": ("CodeGen", _GPT | {"rotary_dim": 4, "n_ctx": MOST}),
    "roberta": ("Roberta", _SIZED | {"is_decoder": True}),
    "bloom": ("Bloom", {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon_alibi": ("Falcon", _PLAIN | {"alibi": True}),
    "falcon": ("Falcon", _PLAIN | {"alibi": False, "max_position_embeddings": MOST}),
    "mpt": ("Mpt", {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": MOST}),
}
RIGHT_ONLY = {"bart": ("Bart", _DECODER), "trocr": ("TrOCR", _DECODER)}  # they take no position ids


def config_of(name):
    kind, options = (OTHERS | RIGHT_ONLY)[name]
    return getattr(tf, f"{kind}Config")(**options)


def model_of(name):
    """A random model with eager attention whose position embeddings matter."""
    if name in CONFIGS:
        model = tiny_model(name)
    else:
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config_of(name), attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.3)
    disable_dropout(model)
    return model


# ---- the limit ----


@pytest.mark.parametrize(
    ("name", "usable"),
    [
        ("roberta", MOST - 2),
        *((name, MOST) for name in ("opt", "biogpt", "bart", "trocr", "gpt_bigcode", "gpt_neo")),
        *((name, MOST) for name in ("gptj", "codegen", "mpt")),
    ],
)
def test_the_limit_is_the_longest_sequence_that_goes_through(name, usable):
    with torch.device("meta"):
        assert position_limit(tf.AutoModelForCausalLM.from_config(config_of(name))) == usable
    model = model_of(name).eval()
    ids = torch.randint(3, 61, (1, usable + 1))
    model(input_ids=ids[:, :usable], use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bloom", "falcon", "falcon_alibi", "gemma3"])
def test_computed_positions_have_no_limit(name):
    model = model_of(name).eval()
    assert position_limit(model) is None
    model(input_ids=torch.randint(3, 61, (1, 80)), use_cache=False)


def test_the_tower_for_images_does_not_count():
    """Gemma 3's vision tower has 256 positions, its language model 131072 and no table."""
    text = _SIZED | {"head_dim": 8, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    model = tf.AutoModelForCausalLM.from_config(config)
    tables = [m.num_embeddings for n, m in model.named_modules() if n.endswith("position_embedding")]
    assert tables == [4]
    assert position_limit(model) is None

    # a language model with a table of its own beside such a tower
    clip = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    table = config_of("biogpt").to_dict()
    both = tf.LlavaConfig(text_config=table, vision_config=clip | {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"})  # fmt: skip # noqa: E501
    llava = tf.LlavaForConditionalGeneration(both)
    assert any("vision" in name and name.endswith("position_embedding") for name, _ in llava.named_modules())
    assert position_limit(llava) == MOST


# ---- padding ----


def padded(ids, left):
    """The sequences [S, T] with their mask and labels; the first two tokens of each are prompt."""
    width = max(map(len, ids)) + 2

    def pad(row, value):
        amount = width - len(row)
        return F.pad(row, (amount, 0) if left else (0, amount), value=value)

    labels = [torch.cat([row.new_full((2,), -100), row[2:]]) for row in ids]
    return (
        torch.stack([pad(row, 1) for row in ids]),
        torch.stack([pad(row, -100) for row in labels]),
        torch.stack([pad(torch.ones_like(row), 0) for row in ids]),
    )


def own_sum(model, ids):
    """The summed log-prob of one sequence without padding, from the model's own logits."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, ids[1:, None])[1:, 0].sum()


@pytest.mark.parametrize("name", [*CONFIGS, *sorted(set(OTHERS) - {"roberta"})])
def test_left_right_and_no_padding_give_the_same_values_and_gradients(name):
    model = model_of(name)
    twin = copy.deepcopy(model)
    attach_fused_head(model)
    ids = sequences(9, 5, 7, 12)
    ref = torch.linspace(-1, 1, 4)

    # the reference: one sequence at a time
    sums = torch.stack([own_sum(twin, row) for row in ids])
    chosen, rejected = (sums - ref).chunk(2)
    loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    loss.backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}

    for left in (False, True):
        given = padded(ids, left)
        torch.testing.assert_close(score_pairs(model, *given).double(), sums.detach(), rtol=2e-5, atol=2e-5)
        model.zero_grad()
        out = dpo_step(model, *given, ref_logps=ref)
        torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=2e-5, atol=2e-5)
        out.loss.backward()
        scale = max(float(gradient.abs().max()) for gradient in expected.values())
        for key, parameter in model.named_parameters():
            if key in expected:
                torch.testing.assert_close(parameter.grad, expected[key], rtol=2e-3, atol=2e-5 * scale)


@pytest.mark.parametrize("name", RIGHT_ONLY)
def test_models_with_a_table_that_take_no_positions_refuse_padding_on_the_left(name):
    model = attach_fused_head(model_of(name))
    ids = sequences(9, 5, 7, 12)
    score_pairs(model, *padded(ids, left=False))
    with pytest.raises(
        ValueError, match=r"attention_mask: was padded on the left, must be on the right: .*ForCausalLM"
    ):
        score_pairs(model, *padded(ids, left=True))


def test_robertas_positions_give_its_own_logits_on_either_side():
    """Its head is more than one layer, so it has no fused head."""
    model = model_of("roberta").eval()
    ids = sequences(9, 5, 7, 12)
    alone = [model(input_ids=row[None]).logits[0] for row in ids]
    for left in (False, True):
        inputs, _, mask = padded(ids, left)
        together = model(input_ids=inputs, attention_mask=mask, position_ids=padded_positions(model, mask)).logits
        for logits, kept, own in zip(together, mask.bool(), alone, strict=True):
            torch.testing.assert_close(logits[kept], own, rtol=1e-4, atol=1e-4)


def test_the_positions_of_a_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    llama = attach_fused_head(tiny_model("llama"))
    assert padded_positions(llama, None) is None
    assert padded_positions(llama, mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert padded_positions(llama, mask.bool()).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert padded_positions(model_of("roberta"), mask).tolist() == [[2, 2, 2, 3, 4], [2, 3, 4, 4, 4]]
    assert padded_positions(model_of("bloom"), mask) is None


def test_a_model_that_counts_from_another_number_is_not_packed():
    model = model_of("roberta")
    assert first_position(model) == 2
    assert use_packed_attention(model) == "RobertaForCausalLM counts positions from 2, and packed sequences are counted from 0"  # fmt: skip # noqa: E501
