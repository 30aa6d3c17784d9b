"""Batches: masks, targets and rows computed by hand; packed and padded give the same loss and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdpo_kernels.dpo_output import pair_output
from sdpo_kernels.integrations.causal_lm import attach_fused_head
from sdpo_kernels.integrations.packed_attention import use_packed_attention
from sdpo_kernels.stepwise.data.batches import Batch, PairDataset, collate_packed, collate_shared, make_collate_padded
from sdpo_kernels.stepwise.data.pairs import Pair
from sdpo_kernels.stepwise.data.tokenize import TokenizedPair, TokenizedPairs, TokenizedSequence, tokenize_pairs
from tests.integrations.tiny_models import VOCAB, tiny_model
from tests.stepwise import runs


def sequence(ids, prompt_length) -> TokenizedSequence:
    return TokenizedSequence(np.array(ids, dtype=np.int32), prompt_length)


def example(index, chosen, rejected, refs=(0.0, 0.0)):
    return {"index": index, "chosen": chosen, "rejected": rejected, "ref_logps": torch.tensor(refs)}


TWO = [
    example(7, sequence([5, 6, 7, 8], 2), sequence([5, 6, 9], 2), (-1.0, -2.0)),
    example(3, sequence([4, 5], 0), sequence([4, 6, 7], 1), (-3.0, -4.0)),
]


def test_packed_by_hand():
    batch = collate_packed(TWO)
    assert next(iter(batch)) == "pair_index"  # accelerate takes the batch size from the first tensor
    assert batch["pair_index"].tolist() == [7, 3]
    assert batch["ref_logps"].tolist() == [-1.0, -3.0, -2.0, -4.0]

    (row,) = batch["groups"]
    # chosen 7, chosen 3, rejected 7, rejected 3, each without its last token
    assert row["input_ids"].tolist() == [[5, 6, 7, 4, 5, 6, 4, 6]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]
    assert row["logp_targets"].tolist() == [[-100, 7, 8, 5, -100, 9, 6, 7]]
    assert set(row) == {"input_ids", "position_ids", "logp_targets"}

    # rows with a target, counted along the row above
    assert batch["rows_index"].tolist() == [1, 2, 3, 5, 6, 7]
    assert batch["rows_segment"].tolist() == [0, 0, 1, 2, 3, 3]
    assert batch["rows_counts"].tolist() == [2, 1, 1, 2]
    assert Batch.of(batch).n_rows == 8


def test_shared_by_hand():
    batch = collate_shared(TWO)
    assert next(iter(batch)) == "pair_index"
    assert batch["ref_logps"].tolist() == [-1.0, -3.0, -2.0, -4.0]

    # 5 6 of the first pair and 4 of the second go through the model once; 5 6 | 7 and nothing more, 4 | nothing and 6
    (row,) = batch["groups"]
    assert row["input_ids"].tolist() == [[5, 6, 7, 4, 6]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert row["logp_source"].tolist() == [1, 2, 1, 3, 3, 4]
    assert row["logp_targets"].tolist() == [7, 8, 9, 5, 6, 7]
    assert batch["expand"].tolist() == [0, 1, 3, 2, 4, 5]
    assert batch["rows_index"].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch["rows_segment"].tolist() == [0, 0, 1, 2, 3, 3]
    assert batch["rows_counts"].tolist() == [2, 1, 1, 2]
    assert Batch.of(batch).n_rows == 8  # as without sharing


THREE = [*TWO, example(4, sequence([7, 8, 9, 10, 11], 3), sequence([7, 8, 9, 12, 13, 14], 3), (-5.0, -6.0))]


def test_padded_by_hand():
    """Six sequences of lengths 4, 2, 5 | 3, 3, 6, sorted into a group of four and a group of two."""
    batch = make_collate_padded(0)(THREE)
    assert next(iter(batch)) == "pair_index"
    assert batch["pair_index"].tolist() == [7, 3, 4]
    assert batch["ref_logps"].tolist() == [-1.0, -3.0, -5.0, -2.0, -4.0, -6.0]

    short, long = batch["groups"]
    assert short["input_ids"].tolist() == [[4, 0, 0], [5, 6, 0], [4, 6, 0], [5, 6, 7]]
    assert short["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert short["logp_targets"].tolist() == [[5, -100, -100], [-100, 9, -100], [6, 7, -100], [-100, 7, 8]]
    assert long["input_ids"].tolist() == [[7, 8, 9, 10, 0], [7, 8, 9, 12, 13]]
    assert long["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert long["logp_targets"].tolist() == [[-100, -100, 10, 11, -100], [-100, -100, 12, 13, 14]]
    assert set(short) == {"input_ids", "attention_mask", "logp_targets"}

    # the rows of `long` are counted on from the 12 of `short`
    assert batch["rows_index"].tolist() == [0, 4, 6, 7, 10, 11, 14, 15, 19, 20, 21]
    assert batch["rows_segment"].tolist() == [1, 3, 4, 4, 0, 0, 2, 2, 5, 5, 5]
    assert batch["rows_counts"].tolist() == [2, 1, 2, 1, 2, 3]
    assert Batch.of(batch).n_rows == 22


def targets_of(collate, examples):
    return [targets for group in collate(examples)["groups"] for targets in group["logp_targets"].flatten().tolist()]


@pytest.mark.parametrize(("prompt_length", "targets"), [(0, [6, 7]), (1, [6, 7]), (2, [-100, 7])])
def test_prompts_of_zero_and_one_token_score_the_same(prompt_length, targets):
    """Nothing predicts the first token, so prompt lengths 0 and 1 give the same rows."""
    one = [example(0, *[sequence([5, 6, 7], prompt_length)] * 2)]
    for collate in (collate_packed, make_collate_padded(0)):
        assert targets_of(collate, one) == targets * 2


def test_padding_is_never_scored_even_if_the_token_occurs_in_texts():
    rows = [example(0, sequence([0, 0, 0], 1), sequence([0, 0], 1))]
    (group,) = make_collate_padded(0)(rows)["groups"]
    assert group["logp_targets"].tolist() == [[0, -100], [0, 0]]
    assert group["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_keep_end_keeps_the_end_of_prompt_and_answers():
    pair = Pair("word1 word2 word3", " good1 good2", " bad1", "d:1")
    tokenizer = runs.make_tokenizer()
    word = {name: i for i, name in enumerate(runs.VOCABULARY)}
    tokens = tokenize_pairs([pair], tokenizer, max_length=4, truncation="keep_end")
    batch = collate_packed([PairDataset(tokens, torch.zeros(1, 2))[0]])
    chosen, rejected = [word[n] for n in ("word3", "good1", "good2")], [word[n] for n in ("word2", "word3", "bad1")]
    (row,) = batch["groups"]
    assert row["input_ids"].tolist() == [chosen + rejected]
    end = word["</s>"]
    assert row["logp_targets"].tolist() == [[word["good1"], word["good2"], end, -100, word["bad1"], end]]


def tokenized(count) -> TokenizedPairs:
    pairs = [Pair("word1", " good1", " bad1", "d:1")] * count
    return tokenize_pairs(pairs, runs.make_tokenizer(), max_length=9, truncation="keep_end")


def test_a_dataset_needs_reference_logps_for_every_pair():
    tokens = tokenize_pairs(
        [Pair("word1", " good1", " bad1", "d:1")], runs.make_tokenizer(), max_length=9, truncation="keep_end"
    )
    with pytest.raises(ValueError, match=r"ref_logps: was of shape \[2, 2\], must be \[1, 2\]"):
        PairDataset(tokens, torch.zeros(2, 2))


def random_examples(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index, (prompt, chosen, rejected) in enumerate(lengths):
        start = torch.randint(3, VOCAB, (prompt,), generator=generator).tolist()
        sides = [
            sequence(start + torch.randint(3, VOCAB, (n,), generator=generator).tolist(), prompt)
            for n in (chosen, rejected)
        ]
        examples.append(example(index, *sides, refs=(-5.0 * index, -3.0)))
    return examples


@pytest.fixture(scope="module")
def llama():
    """Two equal models, the first one with packed attention."""
    packed, padded = (attach_fused_head(tiny_model("llama")) for _ in range(2))
    assert use_packed_attention(packed) is None
    return packed, padded


LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)


@given(LENGTHS, st.integers(0, 99))
def test_packed_shared_and_padded_give_the_same_loss_and_gradients(llama, lengths, seed):
    examples = random_examples(lengths, seed)
    results = []
    ways = zip((llama[0], llama[0], llama[1]), (collate_packed, collate_shared, make_collate_padded(0)), strict=True)
    for model, collate in ways:
        model.zero_grad()
        batch = Batch.of(collate(examples))
        sums = batch.logps(model)
        out = pair_output(sums, batch.ref_logps, batch.rows.counts, beta=0.1)
        out.loss.backward()
        results.append((sums.detach(), out.loss.detach(), [p.grad.clone() for p in model.parameters()]))

    sums_padded, loss_padded, grads_padded = results.pop()
    eps = torch.finfo(torch.float32).eps
    # tiny gradients are differences of large ones: those of q and k are 0 if a token attends to itself alone
    largest = max(float(b.abs().max()) for b in grads_padded)
    for sums, loss, grads in results:
        assert torch.allclose(sums, sums_padded, rtol=32 * eps, atol=32 * eps)
        assert abs(loss - loss_padded) <= 32 * eps * max(1.0, float(loss))
        for a, b in zip(grads, grads_padded, strict=True):
            assert float((a - b).abs().max()) <= 128 * eps * max(largest / 50, float(b.abs().max()))


def test_packed_sequences_score_the_same_as_alone(llama):
    model, _ = llama
    examples = random_examples([(3, 4, 5), (1, 7, 2), (2, 1, 6)], 5)
    with torch.no_grad():
        together = Batch.of(collate_packed(examples)).logps(model)
        alone = torch.cat([Batch.of(collate_packed([one])).logps(model).view(2, 1) for one in examples], 1)
    assert torch.allclose(together, alone.reshape(-1), rtol=1e-6, atol=1e-6)

    # in another order, so that each sequence has other neighbours
    neighbours = [*examples[1:], examples[0]]
    with torch.no_grad():
        moved = Batch.of(collate_packed(neighbours)).logps(model).view(2, 3)
    assert torch.allclose(moved.roll(1, 1).reshape(-1), together, rtol=1e-6, atol=1e-6)


def test_the_dataset_returns_each_pair_with_its_reference_logps(llama):
    tokens = tokenize_pairs(
        [Pair("word1", " good1", " bad1", "d:1")] * 3, runs.make_tokenizer(), max_length=9, truncation="keep_end"
    )
    data = PairDataset(tokens, torch.arange(6.0).view(3, 2))
    assert len(data) == 3
    assert isinstance(tokens[1], TokenizedPair)
    assert collate_packed([data[2], data[0]])["ref_logps"].tolist() == [4.0, 0.0, 5.0, 1.0]
