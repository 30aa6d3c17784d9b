"""Settings of a run: defaults, the error line for each mistake, overrides, round trips, differences."""

import dataclasses
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.settings import trainer as trainer_options
from sdpo_kernels.stepwise.settings.columns import ColumnSettings
from sdpo_kernels.stepwise.settings.run_file import config_diff, dump_config, load_config
from sdpo_kernels.stepwise.settings.run_settings import LoraSettings, RunConfig
from sdpo_kernels.stepwise.settings.yaml_file import read_settings

TRAIN_SIZE = "per_device_train_batch_size"

SMALL = "model: org/model\noutput_dir: runs/x\nstages:\n  - {name: easy, data: a.jsonl}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes run.yaml into an empty working directory and returns its relative name, which keeps messages short."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return "run.yaml"

    return write_file


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load_config(path, overrides)
    return str(raised.value)


def test_a_small_file_gets_the_defaults(write, tmp_path):
    config = load_config(write(SMALL))
    assert (config.dtype, config.order, config.reference, config.policy) == ("float32", "given", "previous", "previous")
    assert (config.loss, config.beta, config.max_length, config.truncation) == ("sigmoid", 0.1, 1024, "keep_start")
    assert (config.on_bad_row, config.batching, config.order_score) == ("error", "packed", "sum")
    assert config.trust_remote_code is False
    assert config.eval_data is config.lora is config.tiers is config.score_column is None
    assert config.trainer == trainer_options.DEFAULT_TRAINER
    assert config.model == "org/model"
    assert config.output_dir == str(tmp_path / "runs/x")
    assert config.stages[0].data == (str(tmp_path / "a.jsonl"),)
    assert config.stages[0].epochs == 1


def test_paths_are_relative_to_the_working_directory_not_the_file(write, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models" / "m").mkdir(parents=True)
    text = (
        "model: models/m\noutput_dir: out\neval_data: ../e.parquet\n"
        "stages: [{name: a, data: [x.jsonl, org/hub:test]}]\n"
    )
    (tmp_path / "elsewhere" / "run.yaml").write_text(text)

    monkeypatch.chdir(tmp_path)
    config = load_config("elsewhere/run.yaml")
    assert config.model == str(tmp_path / "models/m")
    assert config.output_dir == str(tmp_path / "out")
    assert config.eval_data == (str(tmp_path.parent / "e.parquet"),)
    assert config.stages[0].data == (str(tmp_path / "x.jsonl"), "org/hub:test")


def test_numbers_are_parsed_as_in_yaml_1_2(write):
    text = SMALL + "beta: 5e-2\ntrainer: {learning_rate: 5e-7, weight_decay: '1e-2', seed: 010, eval_strategy: no}\n"
    config = load_config(write(text))
    assert config.beta == 0.05
    assert config.trainer["learning_rate"] == 5e-7
    assert config.trainer["weight_decay"] == 0.01
    assert config.trainer["seed"] == 10
    assert config.trainer["eval_strategy"] == "no"


def test_default_trainer_values_are_accepted_by_transformers(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **trainer_options.DEFAULT_TRAINER)
    assert arguments.learning_rate == 5e-7
    assert arguments.report_to == []


def test_stage_settings_override_those_of_the_run(write):
    text = (
        "model: m/m\noutput_dir: o\nbeta: 0.2\ntrainer: {learning_rate: 1e-6, weight_decay: 0.1}\n"
        "stages: [{name: a, data: a.jsonl}, {name: b, data: b.jsonl, beta: 0.05, trainer: {learning_rate: '2e-6'}}]\n"
    )
    config = load_config(write(text))
    first, second = config.stages
    assert (config.stage_beta(first), config.stage_beta(second)) == (0.2, 0.05)
    assert config.stage_trainer(first)["learning_rate"] == 1e-6
    assert config.stage_trainer(second)["learning_rate"] == 2e-6
    assert config.stage_trainer(second)["weight_decay"] == 0.1
    assert config.trainer["learning_rate"] == 1e-6


@pytest.mark.parametrize(("accelerator", "expected"), [(True, None), (False, True)])
def test_bf16_without_an_accelerator_uses_the_cpu(write, monkeypatch, accelerator, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    config = load_config(write(SMALL + "trainer: {bf16: true}\n"))
    assert config.stage_trainer(config.stages[0]).get("use_cpu") is expected
    assert "use_cpu" not in config.trainer
    kept = load_config("run.yaml", ["trainer.use_cpu=false"])
    assert kept.stage_trainer(kept.stages[0])["use_cpu"] is False


def test_losses_by_name_alone_have_weight_1(write):
    config = load_config(write(SMALL + "loss: [sigmoid, {name: sft, weight: 0.5}]\n"))
    assert config.loss == tuple({"name": n, "weight": w, "options": {}} for n, w in (("sigmoid", 1.0), ("sft", 0.5)))


def test_the_papers_word_for_pair_accuracy(write):
    config = load_config(write(SMALL + "order: reward_accuracy\nscore_column: s\n"))
    assert config.order == "pair_accuracy"


def test_lora_settings(write):
    config = load_config(write(SMALL + "dtype: bfloat16\nlora: {r: 8, target_modules: [q_proj, v_proj]}\n"))
    assert config.lora == LoraSettings(r=8, target_modules=("q_proj", "v_proj"))
    assert load_config("run.yaml", ["lora={}"]).lora == LoraSettings(r=16, alpha=32, target_modules="all-linear")


MISTAKES = [
    ("beta: -1", "run.yaml: beta: was -1, must be greater than 0"),
    ("beta: .inf", "run.yaml: beta: was inf, must be a finite number"),
    ("beta: true", "run.yaml: beta: was true, must be a number"),
    ("beta: abc", "run.yaml: beta: was 'abc', must be a valid number"),
    ("grad_tol_relative: true", "run.yaml: grad_tol_relative: was true, needs a grad_tol: for example 0.0156, or 0"),
    (
        "lora: {grad_tol: 0.1}",
        "run.yaml: lora.grad_tol: unknown key; 'grad_tol' belongs at the top level, not under lora",
    ),
    ("beta: null", "run.yaml: beta: was null, must be a valid number"),
    ("bta: 1", "run.yaml: bta: unknown key; did you mean 'beta'?"),
    ("learning_rate: 1", "run.yaml: learning_rate: unknown key; did you mean 'trainer.learning_rate'?"),
    ("max_length: 1", "run.yaml: max_length: was 1, must be greater than or equal to 2"),
    ("max_length: true", "run.yaml: max_length: was true, must be a number"),
    ("order: easy", "run.yaml: order: was 'easy', must be 'given', 'pair_accuracy', 'margin' or 'random'"),
    ("loss: sigmod", "run.yaml: loss: was 'sigmod', must be one of: "),
    ("per_device_batch_size: 1", f"run.yaml: per_device_batch_size: unknown key; did you mean 'trainer.{TRAIN_SIZE}'?"),
    ("batch_size: 1", f"run.yaml: batch_size: unknown key; did you mean 'trainer.{TRAIN_SIZE}'?"),
    ("lr: 1", "run.yaml: lr: unknown key; did you mean 'trainer.learning_rate'?"),
    (
        "trainer: {per_device_batch_size: 1}",
        f"run.yaml: trainer.per_device_batch_size: unknown key; did you mean '{TRAIN_SIZE}'?",
    ),
    (
        "columns: {prompt: [prompt, chosen]}",
        "run.yaml: columns.prompt: was ['prompt', 'chosen'], but the column 'chosen' is also read as chosen; a column",
    ),
    ("columns: {prompt: [a, a]}", "run.yaml: columns.prompt: was ['a', 'a'], must name each column once"),
    ("columns: {chosen: rejected}", "run.yaml: columns.chosen: was 'rejected', but the column 'rejected' is also read"),
    ("columns: {system: prompt}", "run.yaml: columns.system: was 'prompt', but the column 'prompt' is also read as"),
    ("loss: 3", "run.yaml: loss: was 3, must be a name or a list of {name, weight, options}"),
    ("loss: []", "run.yaml: loss: was [], must be a name or a list"),
    (
        "loss: [{name: sigmoid, wieght: 2}]",
        "run.yaml: loss.0.wieght: unknown key, must be one of name, weight, options",
    ),
    ("loss: [{name: ipo}, {name: sgmoid}]", "run.yaml: loss.1.name: was 'sgmoid', must be one of: "),
    ("loss: [{name: dpop, options: {x: 1}}]", "run.yaml: loss.0.options.x: the loss 'dpop' does not use it"),
    ("loss: [{name: ipo, weight: -1}]", "run.yaml: loss.0.weight: was -1, must be a finite number above 0"),
    (
        "loss: [{name: ld_dpo}, {name: sft}]",
        "run.yaml: loss: 'ld_dpo' weighs tokens in the sums, must be the only loss",
    ),
    ("loss: [{name: sigmoid}]\nloss_options: {x: 0.1}", "run.yaml: loss_options: x: was given with a list of losses"),
    ("loss: diffusion_dpo", "run.yaml: loss: was 'diffusion_dpo', which takes denoising errors"),
    ("loss: simpo\nreference: initial", "run.yaml: reference: was 'initial', but simpo uses no reference"),
    ("loss_options: {label_smoothing: true}", "run.yaml: loss_options: label_smoothing: was True, must be"),
    ("loss_options: {f_divergence: kl}", "run.yaml: loss_options: f_divergence: was 'kl', must be one of: reverse_kl"),
    ("loss_options: {smooth: 0.1}", "run.yaml: loss_options: smooth: the loss 'sigmoid' does not use it"),
    ("loss_options: {label_smoothing: 0.7}", "run.yaml: loss_options: label_smoothing: was 0.7, must be"),
    ("dtype: bfloat16", "run.yaml: dtype: was 'bfloat16' without lora, must be float32: updates at lr 5e-7 vanish"),
    ("tiers: 3", "run.yaml: tiers: was 3, but only order: margin uses it (order is given)"),
    ("tiers: 1\norder: margin", "run.yaml: tiers: was 1, must be greater than or equal to 2"),
    ("order: margin", "run.yaml: tiers: is required with order: margin"),
    ("score_column: s", "run.yaml: score_column: was 's', but only order: pair_accuracy uses it (order is given)"),
    ("order_score: mean", "run.yaml: order_score: was 'mean', but nothing is ranked by log-probs"),
    ("order: pair_accuracy\nscore_column: s\norder_score: mean", "run.yaml: order_score: was 'mean', but nothing"),
    ("eval_data: []", "run.yaml: eval_data: was [], must not be empty"),
    ("eval_data: 3", "run.yaml: eval_data: was 3, must be a list"),
    ("eval_data: [a.jsonl, '']", "run.yaml: eval_data.1: was '', must not be empty"),
    ("lerning_rate: 3", "run.yaml: lerning_rate: unknown key; did you mean 'trainer.learning_rate'?"),
    ("lora: {r: 0}", "run.yaml: lora.r: was 0, must be greater than or equal to 1"),
    ("lora: {dropout: 0.1}", "run.yaml: lora.dropout: was 0.1, must be 0: a stage starts from its reference"),
    ("lora: {target_modules: 3}", "run.yaml: lora.target_modules: was 3, must be all-linear, a pattern or a list"),
    ("lora: yes", "run.yaml: lora: was 'yes', must be a mapping"),
    ("trainer: 3", "run.yaml: trainer: was 3, must be a mapping"),
    ("trust_remote_code: maybe", "run.yaml: trust_remote_code: was 'maybe', must be true or false"),
    ("7: x", "run.yaml: 7: was 7, "),
    ("trainer: {learning_rat: 1}", "run.yaml: trainer.learning_rat: unknown key; did you mean 'learning_rate'?"),
    ("trainer: {zzzz: 1}", "run.yaml: trainer.zzzz: unknown key; no similar name exists"),
    ("trainer: {beta: 1}", "run.yaml: trainer.beta: unknown key; 'beta' belongs at the top level, not under trainer"),
    ("trainer: {learning_rate: fast}", "run.yaml: trainer.learning_rate: was 'fast', must be a valid number"),
    ("trainer: {learning_rate: true}", "run.yaml: trainer.learning_rate: was true, must be a number"),
    ("trainer: {learning_rate: 0}", "run.yaml: trainer.learning_rate: was 0, must be above 0"),
    ("trainer: {learning_rate: .nan}", "run.yaml: trainer.learning_rate: was nan, must be a finite number"),
    ("trainer: {gradient_checkpointing: 3}", "run.yaml: trainer.gradient_checkpointing: was 3, must be true or false"),
    ("trainer: {seed: 1.5}", "run.yaml: trainer.seed: was 1.5, must be a valid integer"),
    ("trainer: {per_device_train_batch_size: 0}", "run.yaml: trainer.per_device_train_batch_size: was 0, must"),
    ("trainer: {max_steps: 0}", "run.yaml: trainer.max_steps: was 0, must be at least 1 and at most 2147483647"),
    ("trainer: {lr_scheduler_type: linaer}", "run.yaml: trainer.lr_scheduler_type: was 'linaer'; did you mean 'linear"),
    ("trainer: {log_level: loud}", "run.yaml: trainer.log_level: was 'loud', must be one of detail, debug, info"),
    ("trainer: {train_sampling_strategy: group_by_length}", "run.yaml: trainer.train_sampling_strategy: was 'group"),
    ("trainer: {save_strategy: best}", "run.yaml: trainer.save_strategy: was 'best', must be steps, epoch or no"),
    ("trainer: {bf16: true, fp16: true}", "run.yaml: trainer.fp16: was true together with bf16: true"),
    ("trainer: {eval_strategy: epoch}", "run.yaml: eval_data: is required with eval_strategy: epoch (stage easy)"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_clear_line(write, line, expected):
    message = refusal(write(SMALL + line + "\n"))
    assert message.startswith(expected)
    assert "\n" not in message
    assert "unable to" not in message


STAGE_MISTAKES = [
    ("[]", "run.yaml: stages: was [], must not be empty"),
    ("{name: a, data: x}", "run.yaml: stages: was {'name': 'a', 'data': 'x'}, must be a list"),
    ("[{name: a}]", "run.yaml: stages.0.data: is required"),
    ("[{data: x.jsonl}]", "run.yaml: stages.0.name: is required"),
    ("[a.jsonl]", "run.yaml: stages.0: was 'a.jsonl', must be a mapping"),
    ("[{name: a/b, data: x.jsonl}]", "run.yaml: stages.0.name: was 'a/b', must be at most 64 letters, digits"),
    ("[{name: eval_data, data: x.jsonl}]", "run.yaml: stages.0.name: was 'eval_data', must be another name"),
    ("[{name: .., data: x.jsonl}]", "run.yaml: stages.0.name: was '..', must be at most 64 letters, digits"),
    ("[{name: 1, data: x.jsonl}]", "run.yaml: stages.0.name: was 1, must be a valid string"),
    ("[{name: a, data: []}]", "run.yaml: stages.0.data: was [], must not be empty"),
    ("[{name: a, data: x.jsonl, epoch: 1}]", "run.yaml: stages.0.epoch: unknown key; did you mean 'epochs'?"),
    (
        "[{name: a, prompts: x.jsonl, source: {kind: ranked, judge: 'm:f', budget: 3}}]",
        "run.yaml: stages.0.source.budget: unknown key for this kind; it belongs to kind: discriminator",
    ),
    (
        "[{name: a, prompts: x.jsonl, source: {kind: ranked, jugde: 'm:f'}}]",
        "run.yaml: stages.0.source.jugde: unknown key; did you mean 'judge'?",
    ),
    ("[{name: a, data: x.jsonl, epochs: 0}]", "run.yaml: stages.0.epochs: was 0, must be greater than 0"),
    ("[{name: a, data: x.jsonl, beta: 0}]", "run.yaml: stages.0.beta: was 0, must be greater than 0"),
    (
        "[{name: a, data: x.jsonl, trainer: {warmup_ratio: 0.1}}]",
        "run.yaml: stages.0.trainer.warmup_ratio: was removed in transformers 5: use warmup_steps: a value below 1",
    ),
    (
        "[{name: a, data: x.jsonl}, {name: a, data: y.jsonl}]",
        "run.yaml: stages.1.name: was 'a', must be unique: stages.0 has the same name",
    ),
]


@pytest.mark.parametrize(("stages", "expected"), STAGE_MISTAKES, ids=[stages for stages, _ in STAGE_MISTAKES])
def test_a_mistake_in_a_stage_is_one_clear_line(write, stages, expected):
    message = refusal(write(f"model: m\noutput_dir: o\nstages: {stages}\n"))
    assert message.startswith(expected)
    assert "\n" not in message


def test_exact_gradients_may_be_asked_for_beside_a_relative_tolerance(write):
    """As `sdpo check` proposes it for a run with one; and a config that was saved is read again."""
    config = load_config(write(SMALL + "grad_tol_relative: true\ngrad_tol: 0\n"))
    assert (config.grad_tol, config.grad_tol_relative) == (0, True)
    assert RunConfig.model_validate(config.model_dump()) == config


def test_order_margin_needs_exactly_one_stage(write):
    text = "model: m\noutput_dir: o\norder: margin\ntiers: 3\nstages: [{name: a, data: x}, {name: b, data: y}]\n"
    assert refusal(write(text)).startswith("run.yaml: stages: were 2, must be exactly one with order: margin")
    assert load_config(write(SMALL + "order: margin\ntiers: 3\norder_score: mean\n")).tiers == 3


def test_a_stage_may_not_contradict_the_run(write):
    text = SMALL.replace("a.jsonl}", "a.jsonl, trainer: {fp16: true}}") + "trainer: {bf16: true}\n"
    assert refusal(write(text)).startswith("run.yaml: stages.0.trainer.fp16: was true together with bf16: true")


def test_every_mistake_is_shown_at_once(write):
    lines = refusal(write("beta: -1\nbta: 1\ntrainer: {no_cuda: true, output_dir: x}\n")).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "model",
        "output_dir",
        "beta",
        "stages",
        "trainer.no_cuda",
        "trainer.output_dir",
        "bta",
    ]


@pytest.mark.parametrize("field", sorted(trainer_options.OWNED))
def test_the_error_for_a_field_the_driver_sets_names_an_alternative(write, field):
    assert field in {f.name for f in dataclasses.fields(TrainingArguments)}, "no longer a field: remove it from OWNED"
    message = refusal(write(SMALL + f"trainer: {{{field}: 1}}\n"))
    assert message == f"run.yaml: trainer.{field}: is set by the driver: {trainer_options.OWNED[field]}"


@pytest.mark.parametrize("field", sorted(trainer_options.REMOVED))
def test_the_error_for_a_removed_field_names_its_replacement(write, field):
    assert field not in {f.name for f in dataclasses.fields(TrainingArguments)}
    message = refusal(write(SMALL + f"trainer: {{{field}: 1}}\n"))
    assert message == f"run.yaml: trainer.{field}: was removed in transformers 5: {trainer_options.REMOVED[field]}"


@pytest.mark.parametrize("field", sorted(trainer_options.trainer_fields()))
def test_every_other_field_accepts_its_own_default(field):
    declared = {f.name: f for f in dataclasses.fields(TrainingArguments)}[field]
    default = declared.default if declared.default is not dataclasses.MISSING else declared.default_factory()
    default = getattr(default, "value", default)
    assert trainer_options.check_trainer({field: default}) == {field: default}


def test_byte_order_mark_and_merge_keys_are_supported(write):
    text = "\ufeff" + SMALL.replace("stages", "trainer: &t {seed: 3}\nstages").replace(
        "a.jsonl}", "a.jsonl, trainer: {<<: *t, weight_decay: 0.5}}"
    )
    assert load_config(write(text)).stages[0].trainer == {"seed": 3, "weight_decay": 0.5}


def test_overrides(write):
    path = write(SMALL + "trainer:\n")
    overrides = ["beta=0.3", "trainer.learning_rate=1e-5", "stages.0.beta=5e-2", "stages.0.trainer.seed=7", "lora.r=4"]
    config = load_config(path, [*overrides, "stages.0.data=[x.jsonl, y.jsonl]"])
    assert config.beta == 0.3
    assert config.trainer["learning_rate"] == 1e-5
    assert config.stages[0].beta == 0.05
    assert config.stages[0].trainer == {"seed": 7}
    assert config.lora == LoraSettings(r=4)
    assert len(config.stages[0].data) == 2
    assert load_config(path, ["eval_data="]).eval_data is None


OVERRIDE_MISTAKES = [
    ("beta", "override 'beta': must be key=value"),
    ("=3", "override '=3': must be key=value"),
    ("a..b=3", "override 'a..b=3': must be key=value"),
    ("beta=[1", "override 'beta=[1':1: is not valid YAML"),
    ("beta=-1", "run.yaml: beta: was -1, must be greater than 0 (from the override 'beta=-1')"),
    ("bta=1", "run.yaml: bta: unknown key; did you mean 'beta'? (from the override 'bta=1')"),
    ("trainer.learning_rte=1", "run.yaml: trainer.learning_rte: unknown key; did you mean 'learning_rate'?"),
    ("stages.0.bet=1", "run.yaml: stages.0.bet: unknown key; did you mean 'beta'?"),
    ("stages.1.beta=1", "override 'stages.1.beta=1': stages is a list, '1' must be a position from 0 to 0"),
    ("stages.easy.beta=1", "override 'stages.easy.beta=1': stages is a list, 'easy' must be a position from 0 to 0"),
    ("model.x=1", "override 'model.x=1': model is 'org/model', which has no 'x' in it"),
]


@pytest.mark.parametrize(("override", "expected"), OVERRIDE_MISTAKES, ids=[o for o, _ in OVERRIDE_MISTAKES])
def test_a_wrong_override_is_one_clear_line(write, override, expected):
    message = refusal(write(SMALL), override)
    assert message.startswith(expected)
    assert "\n" not in message


def test_a_model_path_that_is_not_a_folder(write):
    for model in ("./m", "/nowhere/m", "runs/x/stage-1-easy"):
        message = refusal(write(SMALL), f"model={model}")
        assert message == f"run.yaml: model: was {model!r}, which is neither a folder nor the name of a hub model"


def test_an_output_dir_that_is_a_file(write):
    message = refusal(write(SMALL), "output_dir=run.yaml")
    assert message == "run.yaml: output_dir: was 'run.yaml', which is a file, must be a folder"


def test_the_config_is_frozen(write):
    config = load_config(write(SMALL))
    with pytest.raises(ValueError, match="frozen"):
        config.beta = 1.0


def test_a_dumped_config_reads_back_equal(write):
    text = SMALL + (
        "order: pair_accuracy\nscore_column: '1e-5'\neval_data: [e.jsonl, org/x]\nbeta: 1e-9\n"
        "lora: {target_modules: [a]}\ndtype: bfloat16\n"
        "trainer: {run_name: 'no', lr_scheduler_kwargs: {min_lr: 1e-7}, eval_strategy: no, bf16: yes}\n"
    )
    config = load_config(write(text))
    assert load_config(write(dump_config(config))) == config
    assert config.score_column == "1e-5"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    beta=st.floats(min_value=1e-12, max_value=1e6),
    rate=st.floats(min_value=1e-12, max_value=1.0),
    epochs=st.integers(1, 50) | st.floats(min_value=0.01, max_value=50),
    run_name=st.text(max_size=10),
    loss=st.sampled_from(["sigmoid", "ipo", "simpo", [{"name": "hinge", "weight": 0.3}, {"name": "sft"}]]),
)
def test_any_config_survives_dumping_and_loading(write, beta, rate, epochs, run_name, loss):
    config = RunConfig.model_validate(
        {
            "model": "org/m",
            "output_dir": "/tmp/nowhere/x",
            "beta": beta,
            "loss": loss,
            "trainer": {"learning_rate": repr(rate), "run_name": run_name},
            "stages": [{"name": "a", "data": "/tmp/nowhere/a.jsonl", "epochs": epochs}],
        }
    )
    assert config.trainer["learning_rate"] == rate
    assert load_config(write(dump_config(config))) == config


def test_the_difference_between_two_configs(write):
    old = load_config(write(SMALL + "beta: 0.1\nlora: {r: 8}\n"))
    new = load_config(
        write(SMALL.replace("a.jsonl}", "[a.jsonl, b.jsonl], beta: 1.0}") + "beta: 0.05\ntrainer: {tf32: true}\n")
    )
    stored = read_settings(write(dump_config(old)))  # what a run's config.yaml holds: lists where the config has tuples

    assert config_diff(stored, old.model_dump()) == []

    lines = config_diff(stored, new.model_dump())
    assert "beta: 0.1 -> 0.05" in lines
    assert "stages.0.beta: null -> 1.0" in lines
    assert "trainer.tf32: absent -> true" in lines
    assert "lora.r: 8 -> absent" in lines
    assert "lora: absent -> null" in lines
    assert any(line.startswith("stages.0.data.1: absent -> ") and line.endswith("b.jsonl") for line in lines)
    assert not any(line.startswith("model") for line in lines)


def test_columns_may_be_swapped_and_renamed():
    """A name that is another part's own is free once that part has another name."""
    swapped = ColumnSettings.model_validate({"chosen": "rejected", "rejected": "chosen"})
    assert (swapped.chosen, swapped.rejected) == ("rejected", "chosen")
    assert ColumnSettings.model_validate({"prompt": "question", "system": "prompt"}).system == "prompt"


@pytest.mark.parametrize("text", ["loss: dpo", "loss: [{name: dpo}]", "loss: cDPO"])
def test_dpo_is_called_sigmoid_and_losses_that_a_run_refuses_are_not_offered(write, text):
    message = refusal(write(SMALL + text))
    assert message.endswith("; did you mean 'sigmoid'?")
    assert "diffusion_dpo" not in message
    (listed,) = re.findall(r"must be one of: (.*);", message)
    assert len(listed.split(", ")) == 23
