"""The environment in a run's manifest: what it records, and the warning when it has changed."""

import json
from pathlib import Path

import torch

from sdpo_kernels.backends.describe import describe_auto
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
    assert environment["backend"] == describe_auto(torch.device("cpu"), torch.float32)
    expected = {"threads": torch.get_num_threads(), "device": "cpu", "seed": 7, "world_size": 1}
    assert expected.items() <= environment.items()


def test_a_changed_environment_is_a_warning():
    now = run_environment(CONFIG)
    assert environment_warning(Manifest(Path("m"), {"environment": now}), now) is None
    older = {key: value for key, value in now.items() if key not in ("world_size", "backend")}
    assert environment_warning(Manifest(Path("m"), {"environment": older}), now) is None
    before = older | {"threads": 64}
    text = environment_warning(Manifest(Path("m"), {"environment": before}), now)
    assert text.startswith("this machine differs from the one the run was started on")
    assert f"(threads 64 -> {now['threads']})" in text  # a manifest without world_size is of one process
    text = environment_warning(Manifest(Path("m"), {"environment": now | {"backend": "native, AVX9"}}), now)
    assert f"(backend native, AVX9 -> {now['backend']})" in text


def test_the_backend_is_that_of_the_runs_precision(monkeypatch):
    """The native kernels take no float16, and SDPO_BACKEND is what `auto` means."""
    half = CONFIG.model_copy(update={"trainer": CONFIG.trainer | {"fp16": True}})
    assert run_environment(half)["backend"] == ("eager; native skipped: it takes float32 and bfloat16, not float16")
    monkeypatch.setenv("SDPO_BACKEND", "eager")
    assert run_environment(CONFIG)["backend"] == "eager"
