"""The settings `multi`, `ema` and `guiding`: defaults, the error line for each mistake, what `sdpo check` prints."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.settings.run_file import dump_config, load_config
from tests.stepwise import runs

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "methods"
SMALL = "model: org/model\noutput_dir: runs/x\nstages:\n  - {name: easy, data: a.jsonl}\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads settings from text, written to run.yaml in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def load_text(text):
        (tmp_path / "run.yaml").write_text(text)
        return load_config("run.yaml")

    return load_text


MISTAKES = [
    ("reference: multi", "run.yaml: multi: is required with reference: multi"),
    ("multi: {models: [org/a]}", "run.yaml: multi: was given, but only reference: multi uses it (reference is prev"),
    ("ema: {decay: 0.9}", "run.yaml: ema: was given, but only reference: ema uses it (reference is previous)"),
    ("reference: em", "run.yaml: reference: was 'em', must be 'previous', 'initial', 'ema', 'multi', 'guidi"),
    ("reference: guiding", "run.yaml: guiding: is required with reference: guiding (it names the reference model)"),
    ("guiding: org/a", "run.yaml: guiding: was given, but only reference: guiding uses it (reference is previous)"),
    ("reference: guiding\nguiding: ./nowhere", "run.yaml: guiding: was './nowhere', which is neither a folder nor"),
    ("reference: multi\nmulti: {}", "run.yaml: multi.models: is required"),
    ("reference: multi\nmulti: {models: []}", "run.yaml: multi.models: was [], must not be empty"),
    ("reference: multi\nmulti: {models: [a], epsilno: 1}", "run.yaml: multi.epsilno: unknown key; did you mean 'epsi"),
    ("reference: multi\nmulti: {models: [a], epsilon: -1}", "run.yaml: multi.epsilon: was -1, must be greater than"),
    ("reference: multi\nmulti: {models: [a], epsilon: 1}", "run.yaml: multi.epsilon: was 1, must be less than 1"),
    ("reference: multi\nmulti: {models: [a], epsilon: yes}", "run.yaml: multi.epsilon: was 'yes', must be"),
    ("reference: multi\nmulti: {models: [a], alpha: sure}", "run.yaml: multi.alpha: was 'sure', must be adaptive or"),
    ("reference: multi\nmulti: {models: [a], alpha: 0.5}", "run.yaml: multi.alpha: was 0.5, must be adaptive or a"),
    (
        "reference: multi\nmulti: {models: [a], alpha: [1]}",
        "run.yaml: multi.alpha: was of length 1, must be of length 2: one weight per reference",
    ),
    (
        "reference: multi\nmulti: {models: [a], alpha: [1, 0]}",
        "run.yaml: multi.alpha: was [1.0, 0.0], must be positive numbers that sum to 1",
    ),
    (
        "reference: multi\nmulti: {models: [a], alpha: [.6, .5]}",
        "run.yaml: multi.alpha: was [0.6, 0.5], must be positive numbers that sum to 1",
    ),
    (
        "reference: multi\nmulti: {models: [a, b], alpha_convention: published}",
        "run.yaml: multi.alpha_convention: was 'published', must be formula with 3 references",
    ),
    ("reference: multi\nmulti: {models: [./nowhere]}", "run.yaml: multi.models.0: was './nowhere', which is neither a"),
    ("reference: multi\nmulti: {models: [a, runs/x/y]}", "run.yaml: multi.models.1: was 'runs/x/y', which is neither"),
    ("reference: ema\nema: {decay: 1}", "run.yaml: ema.decay: was 1, must be less than 1"),
    ("reference: ema\nema: {decay: -0.1}", "run.yaml: ema.decay: was -0.1, must be greater than or equal to 0"),
    ("reference: ema\nema: {sync_steps: 0}", "run.yaml: ema.sync_steps: was 0, must be greater than or equal to 1"),
    ("reference: ema\nema: {sync: 5}", "run.yaml: ema.sync: unknown key; did you mean 'sync_steps'?"),
    ("reference: ema\nema: {mode: fix}", "run.yaml: ema.mode: was 'fix', must be 'ema', 'policy' or 'fixed'"),
    (
        "reference: ema\nema: {mode: fixed, sync_steps: 5}",
        "run.yaml: ema.sync_steps: was 5, but mode: fixed never updates the reference",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "expected"), MISTAKES, ids=[lines for lines, _ in MISTAKES])
def test_a_mistake_is_one_clear_line(load, lines, expected):
    with pytest.raises(UserError) as error:
        load(SMALL + lines + "\n")
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_defaults_and_absolute_paths(load, tmp_path):
    (tmp_path / "other").mkdir()
    config = load(SMALL + "reference: multi\nmulti: {models: [other, org/other]}\n")
    assert config.multi.models == (str(tmp_path / "other"), "org/other")
    assert (config.multi.epsilon, config.multi.alpha, config.multi.alpha_convention) == (0.1, "adaptive", "formula")
    assert load(SMALL + "reference: guiding\nguiding: other\n").guiding == str(tmp_path / "other")
    config = load(SMALL + "reference: ema\nema: {}\n")
    assert (config.ema.decay, config.ema.mode, config.ema.period) == (0.5, "ema", 108)
    assert load(SMALL + "reference: ema\nema: {mode: fixed}\n").ema.period is None
    assert load(SMALL + "reference: ema\n").ema is None


@pytest.mark.parametrize(
    "lines",
    [
        "reference: multi\nmulti: {models: [org/a, org/b], alpha: [0.5, 0.25, 0.25], epsilon: 0}",
        "reference: multi\nmulti: {models: [org/a], alpha_convention: published}",
        "reference: ema\nema: {mode: policy, sync_steps: 7, decay: 0}",
        "reference: ema\nema: {mode: fixed}",
        "reference: guiding\nguiding: org/a",
    ],
)
def test_all_three_survive_dumping_and_loading(load, lines):
    config = load(SMALL + lines + "\n")
    assert load(dump_config(config)) == config


@pytest.mark.parametrize(("name", "mode"), [("mrpo", "multi"), ("sapo_reference", "ema")])
def test_the_examples_load(tmp_path, monkeypatch, name, mode):
    for folder in ("start", "other"):
        (tmp_path / "runs/methods/start" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = load_config(EXAMPLES / f"{name}.yaml")
    assert (config.reference, len(config.stages)) == (mode, 3)
    assert config.output_dir == str(tmp_path / "runs/methods" / name)


# ---- sdpo check ----


def checked(config) -> str:
    stream = io.StringIO()
    check_run(config, Reporter(console=Console(file=stream, width=1000, highlight=False)))
    return stream.getvalue()


def test_check_lists_the_references(tmp_path, model):
    other = runs.make_model(tmp_path / "other", seed=1)
    options = {"models": [str(other)], "alpha": [0.75, 0.25], "alpha_convention": "published"}
    text = checked(runs.configured(tmp_path, model, reference="multi", multi=options))
    assert f"multi      the base (the policy's start) with {other}" in text
    assert "epsilon 0.1, alpha 0.75, 0.25 (published)" in text

    text = checked(runs.configured(tmp_path, model, reference="guiding", guiding=str(other)))
    assert f"guiding    {other} is the reference of every stage" in text


def test_check_counts_how_often_the_reference_is_updated(tmp_path, model):
    """Stages of three and two steps; an update after the last step of a stage has no effect."""
    text = checked(runs.configured(tmp_path, model, reference="ema", ema={"sync_steps": 1}))
    assert "ema        decay 0.5, mode ema; restarts at each stage" in text
    assert "moves every 1 steps: s1 2 times, s2 1 times" in text
    assert "never moves" not in text
    assert "ema.sync_steps: 3 is more than the steps of any stage" in checked(
        runs.configured(tmp_path, model, reference="ema", ema={"sync_steps": 3})
    )
    assert "moves" not in checked(runs.configured(tmp_path, model, reference="ema", ema={"mode": "fixed"}))


def other_tokenizer(folder, swap):
    """A model whose tokenizer has the ids of two words swapped, or one word replaced."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    runs.make_model(folder, seed=1)
    words = list(runs.VOCABULARY)
    if swap:
        words[10], words[11] = words[11], words[10]
    else:
        words[10] = "strange"

    # make_model's tokenizer is replaced, its weights stay
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("swap", [True, False])
def test_a_reference_with_another_vocabulary_is_refused_before_training(tmp_path, model, swap):
    good = runs.make_model(tmp_path / "good", seed=2)
    other = other_tokenizer(tmp_path / "other", swap)
    config = runs.configured(tmp_path, model, reference="multi", multi={"models": [str(good), str(other)]})
    for command in (checked, runs.train):
        with pytest.raises(UserError) as error:
            command(config)
        assert str(error.value).startswith(
            f"multi.models.1: {other}: its tokenizer differs from the model's in 2 tokens"
        )
        assert "all references must share one vocabulary" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_reference_or_one_with_too_small_a_vocabulary_is_refused(tmp_path, model):
    small = runs.make_model(tmp_path / "small", vocab_size=20)
    config = runs.configured(tmp_path, model, reference="multi", multi={"models": [str(small)]})
    with pytest.raises(UserError, match=r"^multi\.models\.0: .*small: model: .*the model's vocabulary ends at 19"):
        checked(config)
    (tmp_path / "empty").mkdir()
    config = runs.configured(tmp_path, model, reference="multi", multi={"models": [str(tmp_path / "empty")]})
    with pytest.raises(UserError, match=r"^multi\.models\.0: .*empty: model: no tokenizer can be loaded from .*empty"):
        checked(config)
