"""Answers of the models to evaluation prompts, in whole runs and against a loop over the model's own logits."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.references import samples
from tests.stepwise import runs


def greedy(folder, prompt: str, longest: int) -> tuple[str, bool]:
    """The answer by one forward pass a token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = start = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        while ids.shape[1] < start.shape[1] + longest:
            following = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            if int(following) == tokenizer.eos_token_id:
                return tokenizer.decode(ids[0, start.shape[1] :], skip_special_tokens=True), True
            ids = torch.cat([ids, following], 1)
    return tokenizer.decode(ids[0, start.shape[1] :], skip_special_tokens=True), False


def test_every_model_answers_the_first_prompts(tmp_path, model, monkeypatch):
    monkeypatch.setattr(samples, "LONGEST", 6)
    rows = runs.make_rows(3, seed=9)
    evaluation = str(runs.write_rows(tmp_path / "eval.jsonl", [rows[0], rows[0] | {"chosen": " good1"}, *rows[1:]]))
    runs.train(runs.configured(tmp_path, model, eval_data=evaluation, samples=2))
    run = tmp_path / "run"
    answers = []
    for folder, weights in ((run, model), (run / "stage-1-s1", None), (run / "stage-2-s2", None)):
        written = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert [sample["prompt"] for sample in written] == [row["prompt"] for row in rows[:2]], "two different prompts"
        for sample in written:
            assert (sample["answer"], sample["ended"]) == greedy(weights or folder, sample["prompt"], 6)
        answers.append([sample["answer"] for sample in written])
    assert answers[0] != answers[2], "training changed them, or the test shows nothing"


def test_samples_change_no_weight_and_may_be_asked_for_later(tmp_path, model, monkeypatch):
    evaluation = str(runs.write_rows(tmp_path / "eval.jsonl", runs.make_rows(3, seed=9)))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    runs.train(runs.configured(tmp_path / "a", model, eval_data=evaluation))
    assert not (tmp_path / "a" / "run" / "samples.jsonl").exists()

    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s2", step=1)
        with pytest.raises(KeyboardInterrupt):
            runs.train(runs.configured(tmp_path / "b", model, eval_data=evaluation))
    runs.train(runs.configured(tmp_path / "b", model, eval_data=evaluation, samples=1))
    assert (tmp_path / "b" / "run" / "samples.jsonl").exists()
    assert (tmp_path / "b" / "run" / "stage-2-s2" / "samples.jsonl").exists()
    weights = [tmp_path / name / "run" / "stage-2-s2" / "model.safetensors" for name in ("a", "b")]
    assert runs.digest(weights[0]) == runs.digest(weights[1])


def test_a_finished_run_answers_as_many_prompts_as_are_asked_for_later(tmp_path, model, monkeypatch):
    monkeypatch.setattr(samples, "LONGEST", 4)
    evaluation = str(runs.write_rows(tmp_path / "eval.jsonl", runs.make_rows(3, seed=9)))
    folders = [tmp_path / "run", *(tmp_path / "run" / f"stage-{n}-s{n}" for n in (1, 2))]
    weights = None
    for asked, written in ((0, None), (1, 1), (20, 3), (2, 3)):
        runs.train(runs.configured(tmp_path, model, eval_data=evaluation, samples=asked))
        files = [folder / "samples.jsonl" for folder in folders]
        counts = [len(file.read_text().splitlines()) if file.exists() else None for file in files]
        assert counts == [written] * 3
        digests = [runs.digest(folder / "model.safetensors") for folder in folders[1:]]
        assert weights in (None, digests)
        weights = digests


def test_an_answer_ends_where_the_models_positions_end(model):
    tokenizer, network = runs.make_tokenizer(), AutoModelForCausalLM.from_pretrained(model).eval()
    network.config.max_position_embeddings = 5
    answer, ended = samples.greedy_answer(network, [20, 21, 22], tokenizer, torch.device("cpu"))
    assert len(answer) == 2 - ended
    assert samples.greedy_answer(network, [20] * 5, tokenizer, torch.device("cpu")) == ([], False)


def test_samples_need_evaluation_data(tmp_path, model):
    with pytest.raises(UserError, match="eval_data: is required with samples: 2"):
        runs.configured(tmp_path, model, samples=2)
