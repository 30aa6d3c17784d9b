"""DeepSpeed's ZeRO-2 and ZeRO-3 on two ranks with gloo: the same weights as one process. `make deepspeed` runs it."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from tests.stepwise import ranks_of_a_run as faults
from tests.stepwise import runs
from tests.stepwise.ranks_of_a_run import Ranks
from tests.stepwise.test_distributed_methods import EPSILON, NEAR, deviation, trained

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: make deepspeed"
    ),
]

DOCS = Path(__file__).parents[2] / "docs/distributed.md"


def zero(folder: Path, stage: int) -> str:
    """The config file that docs/distributed.md shows, with this stage; weights are partitioned though they are tiny."""
    (shown,) = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    config = json.loads(shown)
    limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    config["zero_optimization"] |= {"stage": stage} | {f"stage3_{name}": 0 for name in limits}
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_killed_run_resumes_and_ends_as_one_process(tmp_path, model, stage):
    sizes, saving = (9, 5), {"save_steps": 2}
    whole = trained(tmp_path, model, 1, 4, sizes=sizes, trainer=saving)

    fault = faults.zero3_is_partitioned if stage == 3 else None
    trainer = saving | {"deepspeed": zero(tmp_path, stage), "adam_epsilon": EPSILON, "per_device_train_batch_size": 2}
    yaml = runs.write_settings(tmp_path, model, sizes, trainer=trainer)
    run = tmp_path / "run"
    killed = Ranks(tmp_path, "train", yaml, "--quiet", fault=faults.die_at, options=["s1", 3, (0, 1)])
    assert killed.wait() == [-9, -9], killed.text

    alone = ["trainer.per_device_train_batch_size=4"]
    other = Ranks(tmp_path, "train", yaml, "--quiet", *alone, count=1)
    assert other.wait() == [2], other.text
    said = " ".join(other.text.split())
    assert "checkpoint-2 was saved with 2 processes, must be resumed with as many (now 1)" in said

    again = Ranks(tmp_path, "train", yaml, "--quiet", fault=fault)
    assert again.wait() == [0, 0], again.text
    assert json.loads((run / "manifest.json").read_text())["stages"][0]["resumed_at_step"] == 2
    assert deviation(whole, run) < NEAR


MORE: dict[str, tuple[int, dict[str, Any]]] = {  # ZeRO's stage, settings
    "lora and accumulation": (2, {"lora": {"r": 2}, "trainer": {"gradient_accumulation_steps": 2}}),
    "a tied head": (3, {}),
}


@pytest.mark.parametrize("kind", MORE)
def test_two_ranks_train_the_same_as_one(tmp_path, model, kind):
    stage, settings = MORE[kind]
    if stage == 3:
        model = runs.make_model(tmp_path / "tied", tie_word_embeddings=True)
    settings = settings | {"sizes": (8, 4)}
    whole = trained(tmp_path, model, 1, 4, **settings)
    settings["trainer"] = settings.get("trainer", {}) | {"deepspeed": zero(tmp_path, stage)}
    assert deviation(whole, trained(tmp_path, model, 2, 4, **settings)) < NEAR


@pytest.mark.parametrize("stage", [2, 3])
def test_in_mixed_precision_a_stage_starts_from_its_references_and_saves_what_the_optimizer_holds(
    tmp_path, model, stage
):
    """A run checks its start to 1e-5: references are scored with rounded weights. What is saved is not rounded."""
    run = trained(tmp_path, model, 2, 4, sizes=(8, 4), trainer={"bf16": True, "deepspeed": zero(tmp_path, stage)})
    for record in json.loads((run / "manifest.json").read_text())["stages"]:
        first = next(row for row in runs.metrics(run) if row["stage/name"] == record["name"])
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)

    weights = load_file(run / "stage-2-s2/model.safetensors")
    assert all(not weight.equal(weight.bfloat16().float()) for weight in weights.values() if weight.dim() == 2)
    assert json.loads((run / "stage-2-s2/config.json").read_text())["dtype"] == "float32"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "differs": ({"bf16": {"enabled": True}}, "bf16.enabled=True differs from trainer"),
    "clips otherwise": ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 differs from trainer (max_grad_norm=1.0)"),
    "autocast": ({"torch_autocast": {"enabled": True}}, "torch_autocast: was enabled, must be left out"),
    "tensor parallel": (
        {"tensor_parallel": {"autotp_size": 2}},
        "tensor_parallel.autotp_size: was 2, must be left out",
    ),
    "buffers": ({"data_types": {"buffer_dtype": "bf16"}}, "data_types.buffer_dtype: was 'bf16', must be left out"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_config_that_would_train_something_else_is_an_error(tmp_path, model, kind):
    """Even where DeepSpeed or Trainer would only say so in the first step."""
    more, message = WRONG[kind]
    config = runs.configured(tmp_path, model, trainer={"deepspeed": {"zero_optimization": {"stage": 2}, **more}})
    with pytest.raises(UserError, match=f"^trainer: deepspeed: {re.escape(message)}"):
        training_arguments(config, config.stages[0], tmp_path, tmp_path)


def test_what_a_config_leaves_out_comes_from_trainer(tmp_path, model):
    settings = {
        "max_grad_norm": 0.25,
        "gradient_accumulation_steps": 2,
        "bf16": True,
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    config = runs.configured(tmp_path, model, trainer=settings)
    args = training_arguments(config, config.stages[0], tmp_path, tmp_path)
    found = args.hf_deepspeed_config
    assert found.get_value("gradient_clipping") == 0.25
    assert found.get_value("gradient_accumulation_steps") == 2
    assert (found.get_value("bf16.enabled"), found.dtype()) == (True, torch.bfloat16)


def test_one_process_without_a_launcher_is_an_error(tmp_path, model):
    yaml = runs.write_settings(tmp_path, model, trainer={"deepspeed": zero(tmp_path, 2)})
    child = runs.Child(tmp_path, "train", yaml, "--quiet")
    assert child.wait() == 2
    assert "trainer.deepspeed: needs a launcher, also for one process: torchrun --nproc_per_node 1" in child.text
