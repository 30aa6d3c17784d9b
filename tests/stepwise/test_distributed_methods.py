"""Other features of a run on two and three ranks: the same results as with one process."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.stepwise import ranks_of_a_run as faults
from tests.stepwise import runs
from tests.stepwise.ranks_of_a_run import Ranks
from tests.stepwise.sources.test_generation import JUDGE
from tests.stepwise.sources.test_sources import prompt_file

pytestmark = pytest.mark.xdist_group("distributed")


EPSILON = 1e-6  # Adam's own, 1e-8, turns rounding in gradients near 0 into steps of their own
NEAR = 5e-3 * 1e-2  # of Adam's step, the learning rate: a pair lost or counted twice changes weights by much more


def trained(folder: Path, model: Path, count: int, batch: int, fault: Any = None, options: Any = (), **settings: Any):
    """The folder of a run on `count` ranks, with `batch` pairs per step over all of them."""
    share = {"per_device_train_batch_size": batch // count, "adam_epsilon": EPSILON, **settings.pop("trainer", {})}
    yaml = runs.write_settings(folder, model, trainer=share, **settings).rename(folder / f"{count}.yaml")
    run = folder / f"by-{count}"
    ranks = Ranks(folder, "train", yaml, f"output_dir={run}", "--quiet", count=count, fault=fault, options=options)
    assert ranks.wait() == [0] * count, ranks.text
    return run


def deviation(a: Path, b: Path, pattern: str = "stage-*/model.safetensors") -> float:
    """The largest difference between two runs' weights in the files that match, at least one."""
    names = sorted(path.relative_to(a) for path in a.glob(pattern))
    assert names
    assert names == sorted(path.relative_to(b) for path in b.glob(pattern))
    pairs = [(load_file(a / name), load_file(b / name)) for name in names]
    return max(float((x[key] - y[key]).abs().max()) for x, y in pairs for key in x)


def test_padded_batches_several_references_and_expo(tmp_path, model):
    other = runs.make_model(tmp_path / "other", seed=5)
    evaluation = str(runs.write_rows(tmp_path / "eval.jsonl", runs.make_rows(5, seed=9)))
    settings = {"batching": "padded", "reference": "multi", "multi": {"models": [str(other)]}, "eval_data": evaluation}
    settings |= {"sizes": (9, 5), "post": {"expo": {"alpha": [0.2, 0.4]}}}
    one, two = (trained(tmp_path, model, count, 4, **settings) for count in (1, 2))
    assert deviation(one, two) < NEAR
    assert deviation(one, two, "expo/model.safetensors") < NEAR
    first, second = (json.loads((run / "manifest.json").read_text()) for run in (one, two))
    assert first["post"]["expo"]["alpha"] == second["post"]["expo"]["alpha"]


def test_generated_pairs(tmp_path, model):
    source = {"kind": "ranked", "samples": 3, "max_new_tokens": 40, "batch_size": 12, "judge": JUDGE}
    listed = [{"name": f"s{i}", "prompts": str(prompt_file(tmp_path)), "source": source} for i in (1, 2)]
    one, two = (trained(tmp_path, model, count, 2, stages=listed) for count in (1, 2))
    made = [[path.read_text() for path in sorted(run.glob("stage-*/pairs.jsonl"))] for run in (one, two)]
    assert made[0][0] == made[1][0]
    assert len(made[0]) == len(made[1]) == 2  # rounding may change a sample of the second stage
    assert deviation(one, two, "stage-1-*/model.safetensors") < NEAR


def test_three_ranks_with_uneven_shares(tmp_path, model):
    one, three = (trained(tmp_path, model, count, 3, sizes=(7, 5)) for count in (1, 3))
    assert deviation(one, three) < NEAR


def _asked_to_stop(rank: int, victim: int) -> None:
    """One rank gets SIGTERM in its second step."""
    from sdpo_kernels.stepwise.training.trainer import StageTrainer

    genuine = StageTrainer.training_step

    def training_step(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if rank == victim and self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return genuine(self, *args, **kwargs)

    StageTrainer.training_step = training_step


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_on_one_rank_stops_all_and_the_run_resumes(tmp_path, model, victim):
    whole = trained(tmp_path, model, 1, 4)
    yaml = runs.write_settings(tmp_path, model, trainer={"per_device_train_batch_size": 2, "adam_epsilon": EPSILON})
    stopped = Ranks(tmp_path, "train", yaml, "--quiet", fault=_asked_to_stop, options=[victim])
    assert stopped.wait()[0] == 130, stopped.text  # the other rank waits for rank 0 to print, as with any error
    assert stopped.texts[1] == ""
    assert stopped.text.count("stopped at step 2") == 1
    again = Ranks(tmp_path, "train", yaml, "--quiet")
    assert again.wait() == [0, 0], again.text
    assert json.loads((tmp_path / "run/manifest.json").read_text())["stages"][0]["resumed_at_step"] == 2
    assert deviation(whole, tmp_path / "run") < NEAR


CHECKPOINTED = {"activation_checkpointing": True}
FSDP2: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, settings
    "lora": (2, {"lora": {"r": 2}, "trainer": {"gradient_accumulation_steps": 2}}),
    "accumulation": (2, {"trainer": {"gradient_accumulation_steps": 2}}),
    "tied": (2, {}),
    "extras": (2, {"loss": "wpo"}),
    "three": (3, {}),  # V = 44 splits into 15, 15 and 14 rows
    # the last step's 3 and 2 pairs are 2 groups and 1
    "padded": (2, {"batching": "padded", "sizes": (11, 5), "batch": 6}),
    "ema": (2, {"reference": "ema", "ema": {"decay": 0.5, "sync_steps": 1}}),
    "checkpointed": (2, {"reference": "ema", "ema": {"decay": 0.5, "sync_steps": 1}, "fsdp_config": CHECKPOINTED}),
}


@pytest.mark.parametrize("kind", FSDP2)
def test_fsdp2(tmp_path, model, kind):
    """Besides the plain run in test_distributed: adapters, a tied head, a loss with extra outputs, uneven shards, ranks
    with different numbers of padded groups, a reference that moves, layers that are computed again in the backward."""
    count, settings = FSDP2[kind]
    if kind == "tied":
        model = runs.make_model(tmp_path / "tied", tie_word_embeddings=True)
    settings = {"sizes": (2 * count + 1, 4)} | settings
    batch, options = settings.pop("batch", 2 * count), settings.pop("fsdp_config", {})
    whole = trained(tmp_path, model, 1, batch, **settings)
    settings |= {
        "trainer": settings.get("trainer", {}) | {"fsdp": True, "fsdp_config": options},
        "fault": faults.fsdp_on_cpu,
        "options": [0, kind != "tied", "activation_checkpointing" in options],
    }
    sharded = trained(tmp_path, model, count, batch, **settings)
    assert deviation(whole, sharded) < NEAR
    if kind == "ema":
        assert deviation(whole, sharded, "stage-*/ema.safetensors") < NEAR


@pytest.mark.parametrize("more", [{}, {"dtype": "bfloat16", "lora": {"r": 2}}], ids=["float32", "bfloat16 base"])
def test_fsdp2_in_mixed_precision_starts_from_its_references(tmp_path, model, more):
    """A run checks its start to 1e-5: references are scored with weights rounded as FSDP2 rounds them, and the
    log-probs are not rounded, as they would be with accelerate's own policy."""
    settings: dict[str, Any] = {"fault": faults.fsdp_on_cpu, "trainer": {"fsdp": True, "bf16": True}, **more}
    run = trained(tmp_path, model, 2, 4, **settings)
    for record in json.loads((run / "manifest.json").read_text())["stages"]:
        first = next(row for row in runs.metrics(run) if row["stage/name"] == record["name"])
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("more", [{}, {"lora": {"r": 2}}], ids=["full", "lora"])
def test_an_fsdp2_run_resumes_on_another_number_of_ranks(tmp_path, more):
    """With a reference that moves. Of weights with 4 rows two of three ranks have 2, and the third has none. An adapter
    is also saved if layers are computed again in the backward."""
    fsdp = {"fsdp": True, "fsdp_config": CHECKPOINTED if "lora" in more else {}}
    model = runs.make_model(tmp_path / "narrow", hidden_size=4, num_attention_heads=2)
    more = more | {"reference": "ema", "ema": {"decay": 0.5, "sync_steps": 1}}
    whole = trained(tmp_path, model, 1, 6, sizes=(13, 6), trainer={"save_steps": 2}, **more)
    run = tmp_path / "run"
    for count, (killed_at, codes) in ((2, (3, [-9, -9])), (3, (0, [0, 0, 0]))):
        trainer = {"per_device_train_batch_size": 6 // count, "save_steps": 2, "adam_epsilon": EPSILON, **fsdp}
        yaml = runs.write_settings(tmp_path, model, sizes=(13, 6), trainer=trainer, **more)
        options = [f"output_dir={run}", "--quiet"]
        ranks = Ranks(
            tmp_path,
            "train",
            yaml,
            *options,
            count=count,
            fault=faults.fsdp_on_cpu,
            options=[killed_at, True, "lora" in more],
        )
        assert ranks.wait() == codes, ranks.text
    assert json.loads((run / "manifest.json").read_text())["stages"][0]["resumed_at_step"] == 2
    assert deviation(whole, run) < NEAR
