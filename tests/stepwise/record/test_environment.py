"""The environment in a run's manifest: what it records, and the warning when it has changed."""

import json
from pathlib import Path

import torch

from sdpo_kernels.stepwise.record.environment import environment_warning, run_environment
from sdpo_kernels.stepwise.record.manifest import Manifest
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

CONFIG = RunConfig.model_validate(
    {
        "model": "org/base-7b",
        "output_dir": "r",
        "stages": [{"name": "hard", "data": "d.jsonl"}],
        "trainer": {"seed": 7, "use_cpu": True},
    }
)


def test_environment_is_json():
    environment = run_environment(CONFIG)
    assert json.loads(json.dumps(environment)) == environment
    assert {"torch", "transformers", "host_cores"} <= set(environment)
    expected = {"threads": torch.get_num_threads(), "device": "cpu", "seed": 7, "world_size": 1}
    assert expected.items() <= environment.items()


def test_a_changed_environment_is_a_warning():
    now = run_environment(CONFIG)
    assert environment_warning(Manifest(Path("m"), {"environment": now}), now) is None
    before = {key: value for key, value in now.items() if key != "world_size"} | {"threads": 64}
    text = environment_warning(Manifest(Path("m"), {"environment": before}), now)
    assert text.startswith("this machine differs from the one the run was started on")
    assert f"(threads 64 -> {now['threads']})" in text  # a manifest without world_size is of one process
