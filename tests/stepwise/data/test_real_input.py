"""Whole runs on real models, tokenizers and preference data from ../shared/data."""

import gzip
import json
import math
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sdpo_kernels.stepwise.prepare import prepare
from tests.stepwise import runs

LN2 = math.log(2)
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)

pytestmark = pytest.mark.slow


def rows_of(path: Path, start: int, stop: int) -> list[dict]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for number, line in enumerate(stream) if start <= number < stop]


def stages_start_at_ln_2(manifest) -> None:
    for stage in manifest["stages"]:
        assert stage["state"] == "done"
        assert stage["first_loss"] == pytest.approx(LN2, abs=1e-3)


def test_two_epochs_on_700_grammar_pairs_raise_held_out_accuracy(tmp_path, data_dir):
    """Measured: .542 before, .738 after with this seed; .682 was the lowest of two seeds and two batch sizes."""
    pack = data_dir / "compact" / "stage1_grammar.jsonl"
    train = runs.write_rows(tmp_path / "train.jsonl", rows_of(pack, 0, 700))
    held_out = runs.write_rows(tmp_path / "held_out.jsonl", rows_of(pack, 700, 1200))

    trainer = {"learning_rate": 5e-4, "per_device_eval_batch_size": 16, "logging_steps": 10}
    stages = [{"name": "grammar", "data": str(train), "epochs": 2}]
    settings = {"stages": stages, "eval_data": str(held_out), "trainer": trainer}
    config = runs.configured(tmp_path, data_dir / "models" / "stories260K", **settings)
    assert prepare(config).warnings == []  # nothing shared, nothing dropped

    manifest = runs.train(config)
    stages_start_at_ln_2(manifest)

    before, after = manifest["initial_eval"], manifest["stages"][0]["eval"]
    assert before["pair_accuracy"] == pytest.approx(0.542, abs=0.005)
    assert after["pair_accuracy"] >= before["pair_accuracy"] + 0.1
    assert after["pair_accuracy_per_token"] >= before["pair_accuracy_per_token"] + 0.1
    assert after["reward_accuracy"] > 0.6


def test_three_stages_of_rising_difficulty(tmp_path, data_dir):
    """Grammar, commonsense, arithmetic: every stage starts from its reference, the previous stage's model."""
    pack = data_dir / "compact"
    sizes = {"stage1_grammar": 320, "stage2_commonsense": 200, "stage3_reasoning": 120}
    stages = []
    for name, size in sizes.items():
        data = runs.write_rows(tmp_path / f"{name}.jsonl", rows_of(pack / f"{name}.jsonl", 0, size))
        stages.append({"name": name.partition("_")[2], "data": str(data)})

    evaluation = runs.write_rows(tmp_path / "eval.jsonl", rows_of(pack / "eval.jsonl", 0, 90))
    trainer = {"learning_rate": 1e-4, "logging_steps": 10}
    settings = {"stages": stages, "eval_data": str(evaluation), "max_length": 512, "trainer": trainer}
    manifest = runs.train(runs.configured(tmp_path, data_dir / "models" / "stories260K", **settings))

    stages_start_at_ln_2(manifest)
    assert [stage["steps"] for stage in manifest["stages"]] == [80, 50, 30]
    assert [stage["pairs"] + stage["dropped"] for stage in manifest["stages"]] == list(sizes.values())

    # each stage had another reference
    hashes = [stage["reference_hash"] for stage in manifest["stages"]]
    assert len(set(hashes)) == 3
    for stage in manifest["stages"]:
        assert 0 < stage["last_loss"] < 1.5
        assert stage["eval"]["pairs"] == 90

    # the model learns within a stage
    first = [line for line in runs.metrics(tmp_path / "run") if line["stage/index"] == 1]
    assert first[-1]["rewards/margins"] > first[0]["rewards/margins"]


def test_a_chat_stage_with_a_large_vocabulary(tmp_path, data_dir):
    """Conversations with system messages and GPT-2's tokenizer with our own template; logits are never built."""
    folder = runs.make_model(
        tmp_path / "model", spread=0.05, vocab_size=50257, hidden_size=32, max_position_embeddings=512,
        bos_token_id=50256, eos_token_id=50256, pad_token_id=50256,
    )  # fmt: skip

    # GPT-2 has no chat template, and make_model's own tokenizer has another vocabulary
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizers" / "gpt2")
    tokenizer.chat_template = CHAT
    for path in folder.glob("tokenizer*"):
        path.unlink()
    tokenizer.save_pretrained(folder)

    rows = rows_of(data_dir / "full" / "stage1_orca_gsm8k.jsonl.gz", 0, 24)
    assert any(message["role"] == "system" for row in rows for message in row["prompt"])
    data = runs.write_rows(tmp_path / "chat.jsonl", rows)

    settings = {
        "stages": [{"name": "chat", "data": str(data), "epochs": 3}],
        "max_length": 256,
        "truncation": "keep_end",
    }
    config = runs.configured(tmp_path, folder, trainer={"learning_rate": 5e-3}, **settings)

    # keep_end must keep the end of the answer
    tokens = prepare(config).stages[0].tokens
    ids = tokens[0].chosen.ids
    text = tokenizer.decode(ids)
    assert text.endswith("<|endoftext|>\n")
    assert "<|assistant|>\n" in text

    manifest = runs.train(config)
    stages_start_at_ln_2(manifest)
    stage = manifest["stages"][0]
    assert stage["pairs"] + stage["dropped"] == 24
    assert stage["steps"] == 3 * math.ceil(stage["pairs"] / 4)

    losses = [line["loss"] for line in runs.metrics(tmp_path / "run")]
    assert sum(losses[-6:]) / 6 < LN2 - 0.1  # the third epoch
