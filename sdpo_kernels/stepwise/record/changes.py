"""What may change between two invocations of a run: all that its trained weights do not depend on.

    differences = refused_changes(manifest.data, header, stages)      # [] if the run may go on

A stage that has started fixes the settings it was trained with, as they hold for that stage: a β of its own is the same
as the run's. Files and models are compared by what is in them (the hash of the tokens, of the weights), never by path.
Stages that have not started may be changed, added and removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sdpo_kernels.stepwise.settings.run_file import config_diff, with_new_defaults
from sdpo_kernels.stepwise.settings.trainer_files import with_content

Record = dict[str, Any]

FILES = "trainer_files"  # in a manifest: the content of the JSON files that `trainer` names, if it names any

# the keys of a stage's record that are fixed once it has started
PLANNED = ("name", "prompts", "pairs", "dropped", "data_hash", "beta", "loss", "reference", "policy")

# settings that no weight depends on, or that are compared by content
_FREE = {
    "output_dir", "model", "eval_data", "columns", "prompt", "on_bad_row", "template_time", "trust_remote_code", "post",
    "reference_cache", "samples", "guiding", "stages", "trainer", "beta",  # the last three as they hold for each stage
}  # fmt: skip
_FREE_OF_TRAINER = {
    "per_device_eval_batch_size", "eval_accumulation_steps", "torch_empty_cache_steps", "skip_memory_metrics",
    "include_num_input_tokens_seen", "use_cpu", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs",
    "report_to", "run_name", "project", "debug", "ddp_timeout", "enable_jit_checkpoint",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
}  # fmt: skip
_FREE_OF_DEEPSPEED = {
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    "tensorboard", "wandb", "comet", "csv_monitor",
}  # fmt: skip
_FREE_OF_GENERATION = {"url", "api_key_env", "requests", "timeout", "python", "options"}  # of a source
_FREE_PREFIXES = ("logging_", "log_", "save_", "eval_", "trackio_")
_BATCH = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}

# why a setting may not change: by the last part of its name that is listed here
_WHY = {
    "order": "it decides which pairs a stage has",
    "order of stages": "they have been trained in this order",
    "tiers": "it decides which pairs a stage has",
    "score_column": "it decides which pairs a stage has",
    "data_hash": "the stage was trained on other tokens",
    "pairs": "the stage was trained on other pairs",
    "dropped": "the stage was trained on other pairs",
    "prompts": "the stage's pairs were generated from other prompts",
    "source": "the stage's pairs were generated with it",
    "max_length": "the tokens depend on it",
    "truncation": "the tokens depend on it",
    "dtype": "the weights have this data type",
    "lora": "the adapter was made with it",
    "quantization": "the adapter was trained on a base that is quantised in this way",
    "trainer": "the steps that are done depend on it",
    "attn_implementation": "the rounding depends on it",
    "batching": "the rounding depends on it",
    "prefix_sharing": "the rounding depends on it",
    "tp_size": "checkpoints are divided by it",
    "template_time": "the tokens may depend on it",
}
_WHY_ELSE = "the weights so far depend on it"


def refused_changes(data: Record, header: Record, stages: Sequence[Record]) -> list[str]:
    """What the manifest `data` does not allow: lines 'key: before -> now (why)', or [] if the run may go on.

    `header` and `stages` are the manifest that the present settings and data would make.
    """
    # settings first: they usually change the data, too, and are what the user can put back
    if lines := refused_settings(data, header):
        return lines

    started = started_stages(data)
    before, now = ({s["name"]: planned(s) for s in part if s["name"] in started} for part in (data["stages"], stages))
    differences = config_diff({"stages": before}, {"stages": now})
    return [_with_reason(line) for line in differences]


def refused_settings(data: Record, header: Record) -> list[str]:
    """The same of the settings alone, before the data is known."""
    started = started_stages(data)
    if not started:
        return []
    old, new = with_new_defaults(data.get("config", {})), header["config"]
    if "prefix_sharing" in new and "prefix_sharing" not in data.get("config", {}):
        old = old | {"prefix_sharing": new["prefix_sharing"]}  # an earlier version's run goes on either way

    # by what is in the files that `trainer` names; runs of earlier versions have only their names
    if FILES in data:
        old, new = (with_content(c, d.get(FILES, {})) for c, d in ((old, data), (new, header)))

    # the stages of tiers are not in the file, and those of ranked orders are in another order
    names = [stage["name"] for stage in new["stages"]]
    if new.get("order", "given") != "given":
        names = sorted(names, key=lambda name: started.index(name) if name in started else len(started))
    if not new.get("tiers") and names[: len(started)] != started:
        line = f"order of stages: {', '.join(started)} -> {', '.join(names[: len(started)])}"
        return [_with_reason(line)]

    # a run with more or fewer processes has the same steps if their product with the batch size is the same
    worlds = [processes_of(record) for record in (data, header)]
    processes = worlds if worlds[0] != worlds[1] else [None, None]
    before, now = (_trained_with(config, started, n) for config, n in zip((old, new), processes, strict=True))
    of_run = config_diff(*({key: config.get(key) for key in ("beta", "trainer")} for config in (old, new)))
    differences = _gathered(config_diff(before, now), started, of_run)

    # not the setting: without it the time of the first start holds
    times = data.get("template_time"), header.get("template_time")
    if None not in times and times[0] != times[1]:
        differences.append(f"template_time: {times[0]} -> {times[1]}")
    return [_with_reason(line) for line in differences]


def processes_of(data: Record) -> int:
    """How many processes the config in a manifest is for: those of the last invocation, else those of the first."""
    return data.get("processes") or data.get("environment", {}).get("world_size", 1)


def started_stages(data: Record) -> list[str]:
    """The names of the stages that have started, in order."""
    return [stage["name"] for stage in data.get("stages", []) if stage.get("state") != "pending"]


def planned(stage: Record) -> Record:
    """The part of a stage's record that is fixed once it has started."""
    generated = stage.get("prompts") is not None  # its pairs are counted once they are generated
    return {key: stage.get(key) for key in PLANNED if not (generated and key in ("pairs", "dropped"))}


def _trained_with(config: Record, started: Sequence[str], processes: int | None) -> Record:
    """The settings that the `started` stages depend on, as they hold for each of them.

    With `processes` the pairs per step take the place of batch size and gradient accumulation.
    """
    run = {key: value for key, value in config.items() if key not in _FREE}
    if run.get("multi"):
        run["multi"] = {key: value for key, value in run["multi"].items() if key != "models"}

    # what a stage publishes is not what the next one starts from
    if run.get("lora"):
        run["lora"] = {key: value for key, value in run["lora"].items() if key != "publish"}

    # of tiers, which share one entry, all have started with it
    stages = [stage for stage in config["stages"] if config.get("tiers") or stage["name"] in started]
    return run | {"stages": {stage["name"]: _of_stage(config, stage, processes) for stage in stages}}


def _of_stage(config: Record, stage: Record, processes: int | None) -> Record:
    own = {key: value for key, value in stage.items() if key in ("epochs", "source")}
    if engine := (own.get("source") or {}).get("generation"):
        kept_of_engine = {key: value for key, value in engine.items() if key not in _FREE_OF_GENERATION}
        own["source"] = own["source"] | {"generation": kept_of_engine}
    beta = config.get("beta") if stage.get("beta") is None else stage["beta"]

    trainer = config.get("trainer", {}) | (stage.get("trainer") or {})
    if processes is not None:
        pairs = math.prod((_BATCH | trainer)[key] for key in _BATCH) * processes
        trainer = {key: value for key, value in trainer.items() if key not in _BATCH}
        trainer[" x ".join([*_BATCH, "processes"])] = pairs
    kept = {
        key: value
        for key, value in trainer.items()
        if key not in _FREE_OF_TRAINER and not key.startswith(_FREE_PREFIXES)
    }
    if isinstance(kept.get("deepspeed"), dict):
        kept["deepspeed"] = {key: v for key, v in kept["deepspeed"].items() if key not in _FREE_OF_DEEPSPEED}
    return own | {"beta": beta, "trainer": kept}


def _gathered(differences: list[str], started: Sequence[str], of_run: Sequence[str]) -> list[str]:
    """`differences` with one line for what has changed in the run's settings (`of_run`) and so in every stage."""
    common = [line for line in of_run if all(f"stages.{name}.{line}" in differences for name in started)]
    covered = {f"stages.{name}.{line}" for name in started for line in common}
    return common + [line for line in differences if line not in covered]


def _with_reason(line: str) -> str:
    """`line` with why the setting, which it starts with, may not change."""
    parts = line.split(": ")[0].split(".")
    why = next((_WHY[part] for part in reversed(parts) if part in _WHY), _WHY_ELSE)
    return f"{line} ({why})"
