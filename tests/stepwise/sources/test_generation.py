"""Sampling is seeded and resumable; samples that did not end are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.models.load import load_generator
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.source import RankedSource
from sdpo_kernels.stepwise.sources import engine_transformers, generation
from sdpo_kernels.stepwise.sources.context import SourceContext
from sdpo_kernels.stepwise.sources.engine import Prompt, text_after
from tests.stepwise.runs import configured, make_model, make_tokenizer

JUDGE = "tests.stepwise.sources.judges:good_words"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), spread=0.1)


def context(folder: Path, model: Path, prompts, *, name="a", config: RunConfig | None = None, **settings):
    config = config or configured(folder, model)
    chosen = {"kind": "ranked", "judge": JUDGE, "max_new_tokens": 40, "batch_size": 5, "samples": 3} | settings
    work = folder / "source"
    work.mkdir(exist_ok=True)
    return SourceContext(
        name=name, settings=RankedSource.model_validate(chosen), prompts=prompts, policy=str(model), initial=str(model),
        beta=0.1, folder=work, before=None, tokenizer=make_tokenizer(),
        scorer=Scorer(config, Precision(torch.device("cpu")), 4, 0, Reporter(quiet=True)),
        reporter=Reporter(quiet=True),
    )  # fmt: skip


PROMPTS = [PromptRow(text, {"prompt": text}, "p:1") for text in ("word1", "word2 word3", "word4 word5 word6", "word7")]


def test_the_same_settings_give_the_same_samples(tmp_path, model):
    first = generation.sample(context(tmp_path, model, PROMPTS), 3)
    again = tmp_path / "again"
    again.mkdir()
    assert generation.sample(context(again, model, PROMPTS), 3) == first
    assert (again / "source/samples.jsonl").read_bytes() == (tmp_path / "source/samples.jsonl").read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    assert generation.sample(context(other, model, PROMPTS, sample_seed=1), 3) != first
    assert [len(group) <= 3 for group in first] == [True] * 4
    assert sum(map(len, first)) > 3


def test_samples_follow_the_models_distribution(tmp_path, model):
    """The first token of many samples against the model's own probabilities; padding must not change them."""
    rows = [PromptRow(text, {"prompt": text}, "") for text in ("word1", "word2 word3 word4")]
    ctx = context(tmp_path, model, rows, max_new_tokens=1, batch_size=500)
    drawn = generation.generate(ctx, [Prompt(row.ids(ctx.tokenizer)) for row in rows], "x.jsonl", 2000)
    network = load_generator(str(model), ctx.scorer.config, torch.device("cpu"))
    lines = [json.loads(line)["ids"] for line in (tmp_path / "source/x.jsonl").read_text().splitlines()[1:]]
    first = torch.tensor([ids[0] for batch in lines for ids in batch]).view(2, 2000)
    assert len(drawn) == 4000
    for row, tokens in zip(rows, first, strict=True):
        ids = torch.tensor([ctx.tokenizer(row.prompt)["input_ids"]])
        with torch.no_grad():
            p = network(ids).logits[0, -1].softmax(-1)
        found = torch.bincount(tokens, minlength=len(p)) / 2000
        assert float((found - p).abs().max()) < 5 * float((p * (1 - p) / 2000).sqrt().max())


def test_a_killed_run_samples_nothing_twice(tmp_path, model, monkeypatch):
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = generation.sample(context(whole, model, PROMPTS), 3)
    real, calls = engine_transformers.generate_batch, []

    def counted(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(engine_transformers, "generate_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        generation.sample(context(tmp_path, model, PROMPTS), 3)
    file = tmp_path / "source/samples.jsonl"
    with file.open("a") as stream:
        stream.write('{"batch": 2, "ids": [[1')  # what a kill in the middle of a line leaves
    calls.clear()
    assert generation.sample(context(tmp_path, model, PROMPTS), 3) == expected
    assert len(calls) == 1  # the last of three batches
    assert file.read_bytes() == (whole / "source/samples.jsonl").read_bytes()


def test_samples_with_other_settings_are_not_reused(tmp_path, model):
    generation.sample(context(tmp_path, model, PROMPTS), 3)
    before = (tmp_path / "source/samples.jsonl").read_text().splitlines()[0]
    generation.sample(context(tmp_path, model, PROMPTS, temperature=0.5), 3)
    lines = (tmp_path / "source/samples.jsonl").read_text().splitlines()
    assert lines[0] != before
    assert len(lines) == 1 + 3


def test_samples_that_did_not_end_are_left_out(tmp_path, model):
    ctx = context(tmp_path, model, PROMPTS, max_new_tokens=1)
    drawn = generation.generate(ctx, [Prompt(PROMPTS[0].ids(ctx.tokenizer))], "x.jsonl", 20)
    assert not all(completion.finished for completion in drawn)
    assert all(completion.ids == [] for completion in drawn if completion.finished)
    assert generation.sample(ctx, 3) == [[], [], [], []]


def test_conversations_go_through_the_chat_template(tmp_path, model):
    row = PromptRow([{"role": "user", "content": "word1"}], {}, "")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}word9{% endif %}"
    )
    assert row.text(tokenizer) == "word1 word9"
    assert row.ids(tokenizer, " good1") == [tokenizer.convert_tokens_to_ids(w) for w in ("word1", "word9", "good1")]
    assert row.pair("good1", "bad1")["chosen"] == [{"role": "assistant", "content": "good1"}]


def test_the_space_before_an_answer_is_kept():
    tokenizer = make_tokenizer()
    prefix, ids = tokenizer("word1 word2")["input_ids"], tokenizer("good1 good2")["input_ids"]
    assert text_after(tokenizer, prefix, ids) == " good1 good2"
