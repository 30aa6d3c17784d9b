"""Runs with `prefix_sharing: auto` beside runs with `off`: the same up to rounding, with fewer tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import LlamaModel

from sdpo_kernels.stepwise.models import load
from tests.stepwise import ranks_of_a_run as faults
from tests.stepwise import runs
from tests.stepwise.ranks_of_a_run import Ranks
from tests.stepwise.sources.test_generation import JUDGE
from tests.stepwise.sources.test_sources import prompt_file

CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "lora": {"lora": {"r": 2}},
    "wpo": {"loss": "wpo"},
    "ld_dpo": {"loss": "ld_dpo", "loss_options": {"ld_alpha": 0.5}},
    "aot": {"loss": "aot"},
    "ema": {"reference": "ema"},
    "checkpointing": {"trainer": {"gradient_checkpointing": True}},
}


@contextmanager
def counted_tokens(training: bool = True) -> Iterator[list[int]]:
    """The tokens of every call of a body that trains, or that scores, without those of the probe of shared prompts."""
    seen: list[int] = []
    forward, probed = LlamaModel.forward, load.use_shared_prefixes

    def counting(self: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        if self.training == training:
            seen.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    def probing(*args: Any, **kwargs: Any) -> Any:
        before = len(seen)
        found = probed(*args, **kwargs)
        del seen[before:]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaModel, "forward", counting)
        patch.setattr(load, "use_shared_prefixes", probing)
        yield seen


def both(
    folder: Path, model: Path, training: bool = True, pairs: int = 8, **settings: Any
) -> tuple[list[Path], list[int]]:
    """The folders of a run with and a run without shared prompts, and the tokens that went through the model."""
    found, tokens = [], []
    for sharing in ("auto", "off"):
        (folder / sharing).mkdir()
        with counted_tokens(training) as seen:
            runs.train(runs.configured(folder / sharing, model, (pairs,), prefix_sharing=sharing, **settings))
        found.append(folder / sharing / "run")
        tokens.append(sum(seen))
    return found, tokens


def assert_same_weights(shared: Path, unshared: Path) -> None:
    ours, theirs = (load_file(run / "stage-1-s1" / "model.safetensors") for run in (shared, unshared))
    for key, tensor in ours.items():
        assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_training(tmp_path, model, case):
    found, tokens = both(tmp_path, model, **CASES[case])
    assert tokens[0] < 0.8 * tokens[1]
    assert_same_weights(*found)


def test_several_references(tmp_path, model):
    """Each is scored with shared prompts."""
    others = [str(runs.make_model(tmp_path / "other", seed=5))]
    found, tokens = both(tmp_path, model, training=False, reference="multi", multi={"models": others})
    assert tokens[0] < 0.8 * tokens[1]
    assert_same_weights(*found)


def test_evaluation(tmp_path, model):
    evaluation = str(runs.write_rows(tmp_path / "eval.jsonl", runs.make_rows(7, seed=9)))
    settings = {"eval_data": evaluation, "trainer": {"eval_strategy": "steps", "eval_steps": 1}}
    found, tokens = both(tmp_path, model, training=False, **settings)
    assert tokens[0] < 0.8 * tokens[1]

    ours, theirs = ([line for line in runs.metrics(run) if "eval_loss" in line] for run in found)
    assert len(ours) == len(theirs) > 1
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_logps/rejected"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name


def test_generated_pairs(tmp_path, model):
    source = {"kind": "ranked", "samples": 3, "max_new_tokens": 40, "batch_size": 12, "judge": JUDGE}
    stages = [{"name": "s1", "prompts": str(prompt_file(tmp_path)), "source": source}]
    found, tokens = both(tmp_path, model, stages=stages)
    assert tokens[0] < tokens[1]
    assert_same_weights(*found)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks(tmp_path, model, kind):
    overrides, fault = (["trainer.fsdp=true"], faults.fsdp_on_cpu) if kind == "fsdp2" else ([], None)
    yaml = runs.write_settings(tmp_path, model, (8,), trainer={"per_device_train_batch_size": 2})
    found = [tmp_path / sharing for sharing in ("auto", "off")]
    for run in found:
        options = [f"output_dir={run}", f"prefix_sharing={run.name}", "--quiet", *overrides]
        ranks = Ranks(tmp_path, "train", yaml, *options, fault=fault)
        assert ranks.wait() == [0, 0], ranks.text
    assert_same_weights(*found)

    # the references, scored by both ranks
    scores = [load_file(run / "stage-1-s1" / "reference_logps.safetensors") for run in found]
    for key, values in scores[0].items():
        assert_close(values, scores[1][key], rtol=1e-6, atol=0)
