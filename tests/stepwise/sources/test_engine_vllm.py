"""Answers by vLLM in a process of its own, with a stub that has its signatures: what it is asked, and failures."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from sdpo_kernels.stepwise import stage as stage_module
from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common import progress
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.sources import engine_vllm, generation
from tests.stepwise.ranks_of_a_run import Ranks
from tests.stepwise.runs import VOCABULARY, Child, make_model
from tests.stepwise.sources.stub_vllm.vllm import sampled
from tests.stepwise.sources.test_generation import JUDGE, PROMPTS, context
from tests.stepwise.sources.test_sources import pairs_of, source_config

QUIET = Reporter(quiet=True)
STUB = Path(__file__).with_name("stub_vllm")
END = VOCABULARY.index("</s>")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), spread=0.1)


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch):
    monkeypatch.setattr(engine_vllm, "LOOK_SECONDS", 0.01)


class Stub:
    """The stub on the workers' path, and what it was asked."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.path, self.monkeypatch = folder / "asked.jsonl", monkeypatch
        monkeypatch.setenv("PYTHONPATH", str(STUB))  # the worker needs nothing of this package
        monkeypatch.setenv("STUB_VLLM", str(self.path))
        self.does("")

    def does(self, what: str) -> None:
        self.monkeypatch.setenv("STUB_VLLM_DOES", what)

    @property
    def asked(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    @property
    def models(self) -> list[dict]:
        return [entry["llm"] for entry in self.asked if "llm" in entry]

    @property
    def calls(self) -> list[dict]:
        return [entry for entry in self.asked if "prompts" in entry]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    return Stub(tmp_path, monkeypatch)


def vllm_context(folder: Path, model: Path, **more):
    engine = {"engine": "vllm", **more.pop("generation", {})}
    return context(folder, model, PROMPTS, batch_size=16, generation=engine, **more)


def vllm_config(folder: Path, model: Path, stages: int = 1, settings=(), kind: str = "ranked", **more):
    source = {"judge": JUDGE} if kind == "ranked" else {}
    engine = {"engine": "vllm", **more.pop("generation", {})}
    return source_config(folder, model, kind, stages, settings, batch_size=16, generation=engine, **source, **more)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and that nobody waits for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- what is asked, and what becomes of the answers ---


def test_every_stage_samples_from_its_policy_and_the_process_has_ended_before_it_trains(
    tmp_path, model, stub, spoken, monkeypatch
):
    alive = []
    genuine = stage_module.prepare_trainer

    def prepared(stage):
        alive.append([is_alive(entry["pid"]) for entry in stub.asked])
        return genuine(stage)

    monkeypatch.setattr(stage_module, "prepare_trainer", prepared)
    manifest = run(vllm_config(tmp_path, model, stages=2), spoken.reporter)

    first = tmp_path / "run/stage-1-s1"
    assert [asked["model"] for asked in stub.models] == [str(model), str(first)]
    assert [asked["dtype"] for asked in stub.models] == ["float32"] * 2
    assert alive == [[False] * 2, [False] * 4]
    assert len({entry["pid"] for entry in stub.asked} | {os.getpid()}) == 3
    assert [stage["generation"] for stage in manifest["stages"]] == [
        {"engine": "vllm", "version": ["0.33.0"], "model": name} for name in (str(model), "stage-1-s1")
    ]
    assert "note       stage s1: answers are sampled from the policy by vLLM, in a process of its own" in spoken.text
    assert "stage 1 of 2 s1: samples  30/30  took " in spoken.text
    assert not list((tmp_path / "run").rglob("vllm"))  # the worker's folder goes with the stage's

    # what the stub "samples" for a prompt and a seed, without the answers that did not end
    lines = [json.loads(line) for line in (first / "source/samples.jsonl").read_text().splitlines()]
    (drawn,) = [line["ids"] for line in lines[1:]]
    texts = [" " + " ".join(VOCABULARY[id] for id in ids[:-1]) for ids in drawn if ids[-1] == END]
    assert 0 < len(texts) < 30
    assert all(pair[side] in texts for pair in pairs_of(first) for side in ("chosen", "rejected"))


def test_each_prompt_is_asked_once_with_the_settings_of_sampling_and_a_seed_of_its_own(tmp_path, model, stub):
    ctx = vllm_context(
        tmp_path, model, temperature=0.7, top_p=0.9, max_new_tokens=6, generation={"options": {"enforce_eager": True}}
    )
    drawn = generation.sample(ctx, 3)
    (asked,), (call,) = stub.models, stub.calls
    prompts = [row.ids(ctx.tokenizer) for row in PROMPTS]
    assert [prompt["prompt_token_ids"] for prompt in call["prompts"]] == prompts
    first = call["first"]
    wanted = {"n": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_tokens": 6, "stop_token_ids": [END]}
    assert first == wanted | {"detokenize": False, "seed": first["seed"]}
    assert asked["enforce_eager"] is True
    assert asked["max_model_len"] == max(map(len, prompts)) + 6

    seeds = [first["seed"] + number for number in range(3)]
    words = [[VOCABULARY[id] for id in sampled(prompts[0], seed, 0.7)] for seed in seeds]
    assert drawn[0] == [" " + " ".join(text) for text, seed in zip(words, seeds, strict=True) if seed % 2 == 0]


def test_it_stops_at_the_models_own_end_tokens_and_at_the_one_that_training_appends(tmp_path, model, stub):
    own = tmp_path / "own"
    shutil.copytree(model, own)
    for name, ends in (("generation_config.json", [4, 5]), ("config.json", 6)):
        settings = json.loads((own / name).read_text()) | {"eos_token_id": ends}
        (own / name).write_text(json.dumps(settings))
    engine = engine_vllm.VllmEngine(vllm_context(tmp_path, own), 3)
    assert engine.ends == [END, 4, 5]

    # vLLM's token ids have the end token; if they did not, the reason would say that there was one
    answers = [[[7, 8, END], "stop"], [[7, 8], "stop"], [[7, 4, 9], "stop"], [[7, 8], "length"]]
    assert engine._rows([answers]) == [[7, 8, END], [7, 8, END], [7, 4], [7, 8]]

    (own / "generation_config.json").unlink()
    assert engine_vllm.VllmEngine(vllm_context(tmp_path, own), 3).ends == [END, 6]


def test_weights_are_computed_with_in_the_precision_of_training(tmp_path, model, stub):
    ctx = vllm_context(tmp_path, model)
    precision = type(ctx.scorer.precision)(torch.device("cpu"), torch.bfloat16)
    object.__setattr__(ctx.scorer, "precision", precision)
    generation.sample(ctx, 2)
    assert stub.models[0]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "publish"), [("float32", "merged"), ("bfloat16", "merged"), ("float32", "adapter")], ids=str
)
def test_a_base_is_sampled_from_with_its_adapter(tmp_path, model, stub, dtype, publish):
    """Merged into a bfloat16 base, small changes would be lost; merged in float32 they are kept, if they are there."""
    lora = {"r": 5, "alpha": 8, "publish": publish}
    options = {"dtype": "bfloat16"} if publish == "adapter" else {}
    run(vllm_config(tmp_path, model, 2, {"lora": lora, "dtype": dtype}, generation={"options": options}), QUIET)
    second, call = stub.models[1], stub.calls[1]
    stage = tmp_path / "run/stage-1-s1"
    if (dtype, publish) == ("float32", "merged"):
        assert (second["model"], second["enable_lora"], call["lora"]) == (str(stage), False, None)
    else:
        assert (second["model"], second["enable_lora"], second["max_lora_rank"]) == (str(model), True, 8)
        assert call["lora"] == {"lora_name": "policy", "lora_int_id": 1, "lora_path": str(stage / "adapter")}


NOT_OF_VLLM = [
    ({"dtype": "bfloat16"}, {"use_dora": True}, "lora.use_dora: was true, must be left out: vLLM samples stage s2"),
    ({"dtype": "bfloat16"}, {"modules_to_save": ["lm_head"]}, r"lora.modules_to_save: was \[.lm_head.\], must be"),
    ({"dtype": "bfloat16"}, {"rank_pattern": {"q_proj": 513}}, "lora.r: was 513, must be at most 512: vLLM samples"),
    ({}, {"publish": "adapter"}, r"dtype: was 'float32', must be bfloat16 \(or trainer.bf16: true\): vLLM samples st"),
]


@pytest.mark.parametrize(("settings", "lora", "message"), NOT_OF_VLLM)
def test_adapters_that_vllm_does_not_have_are_an_error_before_the_first_stage(
    tmp_path, model, stub, settings, lora, message
):
    """vLLM would say so when the second stage samples. With merged weights, or a single stage, nothing is wrong."""
    settings = settings | {"lora": {"r": 4, **lora}}
    with pytest.raises(UserError, match=f"stage s2: source: {message}.*merged weights can be sampled from: dtype: fl"):
        check_run(vllm_config(tmp_path, model, 2, settings), QUIET)
    check_run(vllm_config(tmp_path, model, 1, settings), QUIET)
    merged = settings | {"dtype": "float32", "lora": {"r": 4, **lora, "publish": "merged"}}
    check_run(vllm_config(tmp_path, model, 2, merged), QUIET)


def test_patterns_of_ranks_need_a_vllm_that_reads_them(tmp_path, model, stub):
    stub.does("old")
    settings = {"dtype": "bfloat16", "lora": {"r": 4, "rank_pattern": {"q_proj": 8}}}
    with pytest.raises(UserError, match=r"exit code 1; .*\n  vLLM 0\.33\.0 ignores rank_pattern and alpha_pattern of"):
        run(vllm_config(tmp_path, model, 2, settings), QUIET)
    stub.does("")
    run(vllm_config(tmp_path, model, 2, settings), QUIET)
    assert stub.models[-1]["max_lora_rank"] == 8


def test_a_quantised_base_is_another_one_than_vllms(tmp_path, model):
    rest = r"was 'vllm', must be transformers \(or a url\) with quantization: vLLM would sample from another base"
    with pytest.raises(UserError, match=rf"stages\.0\.source\.generation\.engine: {rest}"):
        vllm_config(tmp_path, model, 1, {"lora": {}, "quantization": {}})


def test_segments_are_rewritten_by_vllm(tmp_path, model, stub):
    settings = {"segment_tokens": 2, "samples": 2, "pairs": 12, "buffer": 15, "max_new_tokens": 5}
    run(vllm_config(tmp_path, model, kind="self_augmented", **settings), QUIET)
    (call,) = stub.calls
    assert len(call["prompts"]) == 20
    assert call["first"]["n"] == 1
    assert len(pairs_of(tmp_path / "run/stage-1-s1")) == 12


@pytest.mark.xdist_group("distributed")
def test_rank_0_alone_starts_it_and_without_the_launchers_variables(tmp_path, model, stub):
    vllm_config(tmp_path, model, settings={"trainer": {"per_device_train_batch_size": 1}})
    ranks = Ranks(tmp_path, "train", tmp_path / "run.yaml", "--quiet", fault=_environment, options=(variables(),))
    assert ranks.wait() == [0, 0], ranks.text
    assert len(stub.models) == 1
    assert [entry["environment"] for entry in stub.asked] == [[], []]


def _environment(rank: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)


# --- resuming, and what can fail ---


def in_portions(monkeypatch) -> None:
    """Two prompts of three answers at a time."""
    monkeypatch.setattr(engine_vllm, "PORTION", 6)


@pytest.mark.parametrize(
    ("does", "how"),
    [
        ("fail", r"ended with exit code 1; .*\n  ValueError: No available memory for the cache blocks."),
        ("die", r"was killed by signal 9 \(SIGKILL\); the end of .*vllm/log.txt: it printed nothing"),
    ],
)
def test_a_worker_that_fails_is_one_error_and_its_answers_are_kept(tmp_path, model, stub, monkeypatch, does, how):
    in_portions(monkeypatch)
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = generation.sample(vllm_context(whole, model), 3)

    stub.does(does)
    before = len(stub.calls)
    with pytest.raises(UserError, match=rf"(?s)a: samples: vLLM's process {how}"):
        generation.sample(vllm_context(tmp_path, model), 3)
    stub.does("")
    assert generation.sample(vllm_context(tmp_path, model), 3) == expected
    asked = [[prompt["prompt_token_ids"] for prompt in call["prompts"]] for call in stub.calls[before:]]
    assert [len(prompts) for prompts in asked] == [2, 2, 2]
    assert asked[1] == asked[2]  # those of the call that failed
    assert (tmp_path / "source/samples.jsonl").read_bytes() == (whole / "source/samples.jsonl").read_bytes()
    generation.sample(vllm_context(tmp_path, model), 3)
    assert len(stub.calls) == before + 3  # nothing was missing, so nothing was started


def test_the_worker_ends_with_a_killed_run_which_resumes(tmp_path, model, stub):
    config = vllm_config(tmp_path, model)
    stub.does("hang")
    child = Child(tmp_path, "train", tmp_path / "run.yaml", "--quiet", fault=_in_portions, options=(variables(),))
    samples = tmp_path / "run/.stage-1-s1/source/samples.jsonl"
    child.wait_for(lambda: len(stub.calls) == 2 and samples.read_bytes().count(b"\n") == 2)
    pid = stub.asked[0]["pid"]
    assert is_alive(pid), child.text
    child.signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert has_ended(pid)

    # five prompts in the first portion, of 15 answers, and five in the second, which is asked for again
    stub.does("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_vllm, "PORTION", 15)
        run(config, QUIET)
    assert [len(call["prompts"]) for call in stub.calls] == [5, 5, 5]
    assert stub.calls[1]["prompts"] == stub.calls[2]["prompts"]


def _in_portions(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    engine_vllm.PORTION = 15


def variables() -> dict[str, str]:
    """The stub's own, for a process that was forked from an older one."""
    return {name: os.environ[name] for name in ("PYTHONPATH", "STUB_VLLM", "STUB_VLLM_DOES")}


def has_ended(pid: int, seconds: float = 20.0) -> bool:
    """Wait until the process has ended; False if it has not by then."""
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not is_alive(pid)


def test_ctrl_c_ends_the_worker(tmp_path, model, stub, monkeypatch):
    in_portions(monkeypatch)
    stub.does("hang")

    def interrupts(self, done: int, note: str = "") -> None:
        if done == 6:
            raise KeyboardInterrupt

    ctx = vllm_context(tmp_path, model)
    monkeypatch.setattr(progress._Silent, "update", interrupts)
    with pytest.raises(KeyboardInterrupt):
        generation.sample(ctx, 3)
    assert not is_alive(stub.asked[0]["pid"])


def test_a_process_that_vllm_leaves_behind_is_ended(tmp_path, model, stub):
    stub.does("child")
    generation.sample(vllm_context(tmp_path, model), 3)
    child = stub.asked[0]["child"]
    assert child != stub.asked[0]["pid"]
    assert has_ended(child)


def test_without_vllm_nothing_is_trained(tmp_path, model, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    text = "stage s1: source: generation.engine: was 'vllm', but the package vllm is not installed for "
    for starts in (run, check_run):
        with pytest.raises(UserError, match=re.escape(f"{text}{sys.executable}; install it there, or in an")):
            starts(vllm_config(tmp_path, model), QUIET)
    with pytest.raises(UserError, match=r"generation\.python: /nonexistent/python cannot be started: No such file"):
        run(vllm_config(tmp_path, model, generation={"python": "/nonexistent/python"}), QUIET)
    assert not (tmp_path / "run").exists()


def test_vllm_may_be_in_an_environment_of_its_own(tmp_path, model, stub, monkeypatch):
    """A Python that is found on the path of that name alone, and sees none of this environment's packages."""
    script = tmp_path / "python-of-vllm"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={STUB} exec {sys._base_executable} -S "$@"\n')
    script.chmod(0o755)
    monkeypatch.delenv("PYTHONPATH")
    generation.sample(vllm_context(tmp_path, model, generation={"python": str(script)}), 3)
    assert len(stub.models) == 1
