"""Tokenised pairs: equality with TRL, truncation, dropped pairs, the flat arrays, every error."""

import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.pairs import Pair, read_pairs
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs, tokenize_pairs

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
TOKENIZERS = ["tokenizers/gpt2", "tokenizers/dolma2-100k", "tokenizers/minimind-6k"]
CHARACTERS = "abcdefghij <>/\n"
EOS = len(CHARACTERS)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<{{ m.role[0] }}>{{ m.content }}{% if tools %}{{ tools | length }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% if hint %}ccc{% endif %}{% endif %}"
)


def character_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per character of CHARACTERS; '~' is the EOS token if `special` says so."""
    vocabulary = {character: place for place, character in enumerate(CHARACTERS)} | {"~": EOS, "?": EOS + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **special)


@pytest.fixture(scope="module")
def characters() -> PreTrainedTokenizerFast:
    return character_tokenizer(eos_token="~", chat_template=TEMPLATE)


@pytest.fixture(scope="module", params=TOKENIZERS)
def real_tokenizer(request):
    return load_tokenizer(request.param)


def load_tokenizer(name: str):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent")
    return AutoTokenizer.from_pretrained(DATA / name)


def load_pairs(*names: str, every: int = 1) -> list[Pair]:
    for name in names:
        if not (DATA / name).exists():
            pytest.skip(f"{DATA / name} is absent")
    return read_pairs([str(DATA / name) for name in names], on_bad_row="error").pairs[::every]


def pair(prompt, chosen, rejected, **options) -> Pair:
    return Pair(prompt, chosen, rejected, "d.jsonl:1", **options)


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def chat(prompt: str, chosen: str, rejected: str, **options) -> Pair:
    return pair(message("user", prompt), message("assistant", chosen), message("assistant", rejected), **options)


def ids(text: str) -> list[int]:
    return [EOS if character == "~" else CHARACTERS.index(character) for character in text]


def rows(tokens: TokenizedPairs) -> list[tuple]:
    """(ids, prompt length) of chosen and rejected, flat, for each pair."""
    return [
        (chosen.ids.tolist(), chosen.prompt_length, rejected.ids.tolist(), rejected.prompt_length)
        for chosen, rejected in tokens
    ]


def tokenize(pairs, tokenizer, max_length=1000, truncation="keep_start") -> TokenizedPairs:
    return tokenize_pairs(pairs, tokenizer, max_length=max_length, truncation=truncation)


# Token ids


def test_plain_text_gets_the_eos_token_once(characters):
    tokens = tokenize([pair("ab", " c", " d~")], characters)
    assert rows(tokens) == [(ids("ab c~"), 2, ids("ab d~"), 2)]
    assert tokens.dropped == tokens.warnings == []


def test_a_conversation_goes_through_the_template(characters):
    tokens = tokenize([chat("ab", "c", "de")], characters)
    # <u>ab\n<a> is the prompt: '<u>' and '<a>' are three characters each; 'u' is unknown to this tokenizer
    prompt = [ids("<")[0], EOS + 1, *ids(">ab\n<a>")]
    assert rows(tokens) == [([*prompt, *ids("c\n")], len(prompt), [*prompt, *ids("de\n")], len(prompt))]


def test_tools_and_template_options_of_a_row_are_passed_to_the_template(characters):
    plain, tools, hint = tokenize(
        [
            chat("ab", "c", "de"),
            chat("ab", "c", "de", tools=[{"type": "function"}] * 2),
            chat("ab", "c", "de", chat_template_kwargs={"hint": True}),
        ],
        characters,
    )
    assert (
        len(tools.chosen.ids) == len(plain.chosen.ids) + 2
    )  # the template writes the number of tools after each message

    # with the hint the prompt ends in 'ccc', of which only the first c is in 'c\n' and none in 'de\n'
    assert hint.chosen.prompt_length == plain.chosen.prompt_length
    assert hint.chosen.ids.tolist() == plain.chosen.ids.tolist()


def test_a_prompt_that_is_not_a_prefix_ends_where_the_texts_differ(characters):
    pairs = [chat("ab", "cd", "cce", chat_template_kwargs={"hint": True}), chat("ab", "c", "d")]
    tokens = tokenize(pairs, characters)
    assert tokens[0].chosen.prompt_length == tokens[0].rejected.prompt_length == tokens[1].chosen.prompt_length + 1
    warning, no_end = tokens.warnings
    assert "2 of 2 pairs" in no_end
    assert "writes no end token" in no_end
    assert warning.startswith("1 of 2 pairs (first: d.jsonl:1): the tokenised prompt is not a prefix of")


def test_plain_and_conversational_pairs_keep_their_order(characters):
    pairs = [chat("a", "b", "c"), pair("a", "b", "c"), chat("d", "e", "f"), pair("d", "e", "f")]
    together = rows(tokenize(pairs, characters))
    assert together == [rows(tokenize([one], characters))[0] for one in pairs]


def test_a_bos_token_is_added_once(characters):
    """Llama-like tokenizers add a BOS token to plain text; in a conversation only the template adds one."""
    opening = character_tokenizer(eos_token="~", chat_template=TEMPLATE)
    opening.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="> $A", special_tokens=[(">", CHARACTERS.index(">"))]
    )
    assert rows(tokenize([pair("ab", "c", "d")], opening)) == [(ids(">abc~"), 3, ids(">abd~"), 3)]
    talk = chat("ab", "c", "de")
    assert rows(tokenize([talk], opening)) == rows(tokenize([talk], characters))
    chosen, _, rejected, _ = rows(tokenize([talk], opening))[0]
    assert (chosen, rejected) == by_the_rule(talk, opening)[:2]


def by_the_rule(one: Pair, tokenizer) -> tuple[list[int], list[int], int]:
    """TRL 1.16's rule for one pair, as simple as possible: prompt + chosen, prompt + rejected, prompt length."""
    if one.is_conversational:
        prompt = tokenizer.apply_chat_template(one.prompt, add_generation_prompt=True)["input_ids"]
        full = [tokenizer.apply_chat_template(one.prompt + text)["input_ids"] for text in (one.chosen, one.rejected)]
    else:
        prompt = tokenizer(one.prompt)["input_ids"]
        full = [tokenizer(one.prompt + text + tokenizer.eos_token)["input_ids"] for text in (one.chosen, one.rejected)]
    length = 0
    while length < min(map(len, [prompt, *full])) and prompt[length] == full[0][length] == full[1][length]:
        length += 1
    return full[0], full[1], length


def test_real_plain_pairs_follow_the_rule(real_tokenizer):
    stages = [f"compact/{name}.jsonl" for name in ("stage1_grammar", "stage2_commonsense", "stage3_reasoning")]
    pairs = load_pairs(*stages, every=10)
    tokens = tokenize(pairs, real_tokenizer)
    assert len(tokens) == len(pairs) == 600
    for one, (chosen, prompt_length, rejected, same_length) in zip(pairs, rows(tokens), strict=True):
        assert (chosen, rejected, prompt_length) == by_the_rule(one, real_tokenizer)
        assert same_length == prompt_length
        assert real_tokenizer.decode(chosen) == one.prompt + one.chosen + real_tokenizer.eos_token


def test_real_conversations_follow_the_rule():
    tokenizer = load_tokenizer("tokenizers/minimind-6k")
    pairs = load_pairs("full/stage3_human_chat.jsonl.gz", "full/stage1_orca_gsm8k.jsonl.gz", every=40)
    tokens = tokenize(pairs, tokenizer, max_length=100_000)
    assert len(tokens) == len(pairs) > 80
    for one, (chosen, prompt_length, rejected, _) in zip(pairs, rows(tokens), strict=True):
        assert (chosen, rejected, prompt_length) == by_the_rule(one, tokenizer)
        assert tokenizer.decode(chosen[prompt_length:]).startswith(one.chosen[0]["content"][:20].strip())


@pytest.mark.parametrize(
    ("name", "source", "every"),
    [(name, "compact/stage2_commonsense.jsonl", 40) for name in TOKENIZERS]
    + [("tokenizers/minimind-6k", "chat_short/stage1_qa_feedback.jsonl", 40)],
)
@pytest.mark.parametrize(("max_length", "truncation"), [(10_000, "keep_start"), (40, "keep_start"), (25, "keep_end")])
def test_real_pairs_equal_trls_own_code(name, source, every, max_length, truncation):
    """`DPOTrainer._prepare_dataset` and its collator, called on the same rows."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    datasets = pytest.importorskip("datasets")
    tokenizer = load_tokenizer(name)
    pairs = load_pairs(source, every=every)
    arguments = types.SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=truncation)
    dataset = datasets.Dataset.from_list(
        [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "at": at} for at, p in enumerate(pairs)]
    )

    # TRL's own methods, without building a trainer, which would need a model
    trainer = types.SimpleNamespace(_tokenizer=tokenizer)
    theirs = dpo_trainer.DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, "train")
    collate = dpo_trainer.DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=truncation)
    assert len(theirs) > 5

    # `kept` also shows that both drop the same pairs; TRL keeps those that truncation makes equal
    ours = tokenize_pairs(pairs, tokenizer, max_length=max_length, truncation=truncation, drop_equal=False)
    assert ours.kept.tolist() == theirs["at"]

    for tokens, row in zip(ours, theirs, strict=True):
        batch = collate([row])
        for half, sequence in enumerate(tokens):
            length = int(batch["attention_mask"][half].sum())
            assert sequence.ids.tolist() == batch["input_ids"][half, :length].tolist()
            scored = np.arange(length) >= sequence.prompt_length
            assert scored.tolist() == batch["completion_mask"][half, :length].bool().tolist()


# Truncation


def test_keep_start_cuts_the_end(characters):
    tokens = tokenize([pair("abc", "defg", "h")], characters, 5)
    assert rows(tokens) == [(ids("abcde"), 3, ids("abch~"), 3)]


def test_keep_end_cuts_the_start(characters):
    tokens = tokenize([pair("abc", "defg", "h")], characters, 5, "keep_end")
    assert rows(tokens) == [(ids("defg~"), 0, ids("abch~"), 3)]
    assert rows(tokenize([pair("abc", "defg", "h")], characters, 6, "keep_end"))[0][:2] == (ids("cdefg~"), 1)


def test_a_pair_without_a_completion_after_truncation_is_dropped(characters):
    pairs = [pair("a", "b", "c"), Pair("abcde", "b", "c", "d.jsonl:7"), pair("d", "e", "f")]
    tokens = tokenize(pairs, characters, 5)
    assert tokens.kept.tolist() == [0, 2]
    assert tokens.dropped == ["d.jsonl:7: max_length 5 leaves nothing of chosen after a prompt of 5 tokens"]
    assert len(tokenize(pairs, characters, 6)) == 3


def test_a_pair_with_a_sequence_of_one_token_is_dropped(characters):
    only_last_message = character_tokenizer(eos_token="~", chat_template="{{ messages[-1].content }}")
    pairs = [chat("", "a", "bc"), chat("", "b", "ac"), chat("", "bc", "de")]
    tokens = tokenize(pairs, only_last_message)
    assert tokens.kept.tolist() == [2]
    assert tokens.dropped[0] == "d.jsonl:1: chosen has no token to score after its prompt of 0 tokens"
    assert len(tokenize([pair("", "ab", "c")], characters)) == 1  # the EOS token is scored after the first one


def test_keep_end_keeps_a_scored_token_if_two_tokens_fit(characters):
    (row,) = rows(tokenize([pair("abc", "defg", "h")], characters, 2, "keep_end"))
    assert row == (ids("g~"), 0, ids("h~"), 0)


def test_a_max_length_that_leaves_no_pairs_is_an_error(characters):
    with pytest.raises(UserError, match=r"^max_length: was 3, which leaves none of 2 pairs; first: d.jsonl:1: "):
        tokenize([pair("abc", "d", "e")] * 2, characters, 3)


def test_pairs_that_truncation_makes_equal_are_dropped(characters):
    pairs = [pair("ab", "cde", "cdf"), Pair("ab", "cd", "ce", "d.jsonl:2"), pair("ab", "cdhh", "cdhi")]
    tokens = tokenize(pairs, characters, 4)
    assert tokens.kept.tolist() == [1]
    reason = "max_length 4 leaves equal tokens of chosen and rejected; the pair teaches nothing"
    assert tokens.dropped == [f"d.jsonl:1: {reason}"] * 2
    assert rows(tokens) == [(ids("abcd"), 2, ids("abce"), 2)]

    # both ends: keep_end makes others equal
    from_the_start = tokenize([pair("ab", "cde", "fde"), pair("ab", "cd", "ce")], characters, 3, "keep_end")
    assert from_the_start.dropped == [f"d.jsonl:1: {reason.replace('4', '3')}"]
    assert len(tokenize(pairs, characters, 4, "keep_end")) == 3


def test_equal_tokens_of_different_texts_are_dropped_without_blaming_max_length(characters):
    tokens = tokenize([pair("ab", "c", "c~"), pair("ab", "c", "d")], characters)
    assert tokens.dropped == ["d.jsonl:1: chosen and rejected are equal tokens; the pair teaches nothing"]
    assert (tokens.cut_pairs, tokens.lost_tokens) == (0, 0)
    with pytest.raises(UserError, match=r"^nothing to learn in any of 1 pair; first: d.jsonl:1: chosen and"):
        tokenize([pair("ab", "c", "c~")], characters)


def test_equal_tokens_stay_if_they_are_asked_for(characters):
    tokens = tokenize_pairs([pair("ab", "c", "c")], characters, max_length=9, truncation="keep_start", drop_equal=False)
    assert rows(tokens) == [(ids("abc~"), 2, ids("abc~"), 2)]


def test_cut_pairs_and_lost_tokens_are_counted(characters):
    pairs = [
        pair("abc", "defg", "h"),  # 'fg~' of chosen is cut off
        pair("abcde", "f", "g"),  # dropped: 'f~' and 'g~' are lost
        pair("a", "bcdef", "bcdeg"),  # dropped as equal: six scored tokens each are lost
        pair("a", "b", "c"),  # whole
    ]
    tokens = tokenize(pairs, characters, 5)
    assert tokens.cut.tolist() == [True, False]
    assert tokens.lost.tolist() == [3, 0]
    assert (tokens.dropped_cut, tokens.dropped_lost) == (2, 4 + 12)
    assert (tokens.cut_pairs, tokens.lost_tokens) == (3, 19)
    assert tokens.whole_tokens == (5 + 2) + (2 + 2) + (6 + 6) + (2 + 2)


def test_keep_end_loses_scored_tokens_only_past_the_prompt(characters):
    one = [pair("abc", "defg", "h")]  # chosen has 8 tokens, of which 5 are scored
    assert [tokenize(one, characters, length, "keep_end").lost_tokens for length in (8, 7, 6, 5, 4)] == [0, 0, 0, 1, 2]
    assert [tokenize(one, characters, length, "keep_end").cut_pairs for length in (8, 7, 5)] == [0, 1, 1]


def test_the_counts_stay_with_their_pairs(characters):
    pairs = [pair("abc", "defg", "h"), pair("abcde", "f", "g"), pair("a", "b", "c"), pair("b", "defgh", "i")]
    tokens = tokenize(pairs, characters, 5)
    some = tokens.take(np.array([2, 1]))
    assert (some.cut.tolist(), some.lost.tolist(), some.dropped) == ([True, False], [2, 0], [])
    assert (some.cut_pairs, some.lost_tokens) == (1, 2)
    rest = tokens.take(np.array([0]), dropped_from=tokens)
    assert (rest.cut_pairs, rest.lost_tokens, rest.dropped) == (2, 3 + 4, tokens.dropped)

    both = TokenizedPairs.concatenate([some, rest])
    assert (both.cut_pairs, both.lost_tokens, both.whole_tokens) == (3, 9, tokens.whole_tokens)
    assert both.dropped == tokens.dropped
    none = TokenizedPairs.concatenate([])
    assert (none.cut_pairs, none.lost_tokens, none.whole_tokens) == (0, 0, 0)


def test_compact_stage_3_at_256_tokens_loses_a_fifth_of_its_scored_tokens():
    pairs = load_pairs("compact/stage3_reasoning.jsonl")
    tokens = tokenize(pairs, load_tokenizer("models/stories260K"), 256)
    assert (tokens.cut_pairs, len(pairs)) == (1347, 2000)
    assert (tokens.lost_tokens, tokens.whole_tokens) == (113_482, 531_229)
    assert tokenize(pairs, load_tokenizer("models/stories260K"), 10_000).scored.sum() == 531_229
    (dropped,) = tokens.dropped
    assert dropped.endswith("max_length 256 leaves equal tokens of chosen and rejected; the pair teaches nothing")


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("tokenizers/gpt2", "compact/stage1_grammar.jsonl", "a52ff321f47c9d5a"),
        ("models/stories260K", "compact/stage3_reasoning.jsonl", "44234be94ae2edfd"),
        ("tokenizers/minimind-6k", "chat_short/stage1_qa_feedback.jsonl", "671e4ab611fa2b87"),
        ("tokenizers/dolma2-100k", "compact/stage2_commonsense.jsonl", "b7e6169837e54000"),
    ],
)
def test_tokens_of_whole_pairs_are_those_of_earlier_versions(name, source, expected):
    """Else runs that were started with an earlier version could not go on."""
    tokens = tokenize(load_pairs(source), load_tokenizer(name), 100_000)
    assert tokens.content_hash()[:16] == expected
    assert (tokens.cut_pairs, tokens.lost_tokens, tokens.dropped) == (0, 0, [])


PLAIN_TEXT = st.text("abcdefghij ", max_size=12)
ANSWER = st.text("abcdefghij ", min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.tuples(PLAIN_TEXT, ANSWER, ANSWER), min_size=1, max_size=6),
    max_length=st.integers(2, 30),
    truncation=st.sampled_from(["keep_start", "keep_end"]),
)
def test_any_pairs_are_truncated_or_dropped_by_the_rule(characters, texts, max_length, truncation):
    expected, dropped, cut_pairs, lost = [], 0, 0, 0
    for prompt, *answers in texts:
        full = [ids(prompt + answer + "~") for answer in answers]
        if truncation == "keep_start":
            cut = [(whole[:max_length], len(prompt)) for whole in full]
        else:
            cut = [(whole[-max_length:], max(0, len(prompt) - max(0, len(whole) - max_length))) for whole in full]
        cut_pairs += any(len(whole) > max_length for whole in full)
        before = sum(len(whole) - max(1, len(prompt)) for whole in full)
        if all(len(kept) - max(1, start) >= 1 for kept, start in cut) and cut[0] != cut[1]:
            expected.append((*cut[0], *cut[1]))
            lost += before - sum(len(kept) - max(1, start) for kept, start in cut)
        else:
            dropped += 1
            lost += before if any(len(whole) > max_length for whole in full) else 0

    pairs = [pair(*text) for text in texts]
    if not expected:
        with pytest.raises(UserError, match="leaves none" if cut_pairs else "nothing to learn in any"):
            tokenize(pairs, characters, max_length, truncation)
        return

    tokens = tokenize(pairs, characters, max_length, truncation)
    assert rows(tokens) == expected
    assert len(tokens.dropped) == dropped
    assert tokens.lengths.tolist() == [[len(row[0]), len(row[2])] for row in expected]
    assert tokens.lengths.max() <= max_length
    assert (tokens.cut_pairs, tokens.lost_tokens) == (cut_pairs, lost)

    # an answer whose end was cut off is not taught to end
    for at, one in zip(tokens.kept, tokens, strict=True):
        for sequence, answer in zip(one, (pairs[at].chosen, pairs[at].rejected), strict=True):
            is_whole = truncation == "keep_end" or len(pairs[at].prompt + answer) < max_length
            assert (sequence.ids[-1] == EOS) == is_whole


# The arrays


def test_arrays_and_indices(characters):
    tokens = tokenize([pair("ab", "c", "defg"), pair("a", "b", "c")], characters)
    assert (tokens.ids.dtype, tokens.offsets.dtype, tokens.prompt_lengths.dtype) == (np.int32, np.int64, np.int32)
    assert tokens.offsets.tolist() == [0, 4, 11, 14, 17]
    assert tokens.prompt_lengths.tolist() == [2, 2, 1, 1]
    assert len(tokens) == 2
    assert tokens[-1].chosen.ids.tolist() == tokens[1].chosen.ids.tolist() == ids("ab~")
    assert tokens[np.int64(1)].rejected.ids.tolist() == ids("ac~")
    for index in (2, -3):
        with pytest.raises(IndexError, match="index: was"):
            tokens[index]


def test_no_pairs_are_empty_arrays(characters):
    tokens = tokenize([], characters)
    assert len(tokens) == 0
    assert tokens.lengths.shape == (0, 2)


def test_content_hash_depends_on_tokens_and_prompt_lengths_only(characters):
    pairs = [pair("ab", "c", "d"), pair("a", "b", "c")]
    first = tokenize(pairs, characters)
    assert first.content_hash() == tokenize(pairs, characters).content_hash()
    moved = tokenize([pair("a", "bc", "bd"), pairs[1]], characters)
    assert np.array_equal(moved.ids, first.ids)
    others = [moved, tokenize(pairs[::-1], characters), tokenize(pairs[:1], characters)]
    assert len({first.content_hash(), *(other.content_hash() for other in others)}) == 4
    elsewhere = [Pair(p.prompt, p.chosen, p.rejected, "other.jsonl:9") for p in pairs]
    assert tokenize(elsewhere, characters).content_hash() == first.content_hash()


# Errors


def refusal(one: Pair, tokenizer) -> str:
    with pytest.raises(UserError) as raised:
        tokenize([one], tokenizer)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_no_eos_token():
    tokenizer = character_tokenizer(chat_template=TEMPLATE)
    kind = type(tokenizer).__name__
    text = refusal(pair("a", "b", "c"), tokenizer)
    assert text == f"d.jsonl:1: is plain text, which needs an EOS token, but the tokenizer {kind} has none"
    assert len(tokenize([chat("a", "b", "c")], tokenizer)) == 1


def test_no_chat_template():
    tokenizer = character_tokenizer(eos_token="~")
    text = refusal(chat("a", "b", "c"), tokenizer)
    kind = type(tokenizer).__name__
    assert text == f"d.jsonl:1: is a conversation, but the tokenizer {kind} has no chat template"
    assert len(tokenize([pair("a", "b", "c")], tokenizer)) == 1


def test_a_template_that_raises(characters):
    text = refusal(pair(message("system", "a"), message("assistant", "b"), message("assistant", "c")), characters)
    assert text == "d.jsonl:1: the tokenizer's chat template failed: TemplateError: no system turn"


@pytest.mark.parametrize("name", ["where", "prompt", "answers"])
def test_a_template_option_may_have_any_other_name(characters, name):
    assert len(tokenize([chat("a", "b", "c", chat_template_kwargs={name: 1})], characters)) == 1


def test_a_template_option_that_clashes_with_our_own(characters):
    text = refusal(chat("a", "b", "c", chat_template_kwargs={"add_generation_prompt": True}), characters)
    assert text.startswith("d.jsonl:1: the tokenizer's chat template failed: TypeError: ")
