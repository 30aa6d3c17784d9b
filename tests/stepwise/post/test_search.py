"""The search over α, its scores, and the command `sdpo expo`."""

from __future__ import annotations

import io
import json
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sdpo_kernels import cli
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.models.load import release_memory
from sdpo_kernels.stepwise.post import search as search_module
from sdpo_kernels.stepwise.post.dev_score import CommandScore, PairScore
from sdpo_kernels.stepwise.post.search import Found, Trial, search, search_notes, search_table
from sdpo_kernels.stepwise.settings.run_file import load_config
from tests.stepwise import runs
from tests.stepwise.post.test_expo import save

ALPHAS = (0.5, 0.1, 0.3)


@pytest.fixture
def sides(tmp_path):
    """θ0 = 0 and θ1 = 1, so the weight is 1 + α."""
    return save(tmp_path / "0", {"w": torch.zeros(2)}), save(tmp_path / "1", {"w": torch.ones(2)})


def value(folder: Path) -> float:
    return float(load_file(folder / "model.safetensors")["w"][0])


def test_the_best_is_found(tmp_path, sides):
    seen = []

    def score(folder):
        seen.append((value(folder), folder == sides[1]))
        return -abs(value(folder) - 1.32)

    found = search(*sides, ALPHAS, score, tmp_path / "try")
    assert seen == [(1.5, False), (pytest.approx(1.3), False), (pytest.approx(1.1), False), (1.0, True)]
    assert [trial.alpha for trial in found.trials] == [0.0, 0.1, 0.3, 0.5]
    assert (found.best.alpha, found.gained) == (0.3, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize(
    ("scores", "best", "gained"),
    [((1, 2, 2, 2), 0.1, True), ((2, 2, 1, 2), 0.0, False), ((3, 1, 1, 1), 0.0, False), ((-3, -2, -1, -2), 0.3, True)],
)
def test_equal_scores_go_to_the_smaller_alpha(scores, best, gained):
    found = Found(tuple(map(Trial, (0.0, 0.1, 0.3, 0.5), scores)))
    assert (found.best.alpha, found.gained) == (best, gained)
    stream = io.StringIO()
    Console(file=stream, width=80).print(search_table(found, "my score"))
    (kept,) = [line for line in stream.getvalue().splitlines() if "kept" in line]
    assert f" {best:g} " in kept
    assert any("No α above 0" in line for line in search_notes(found, "my score")) is not gained


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_stops_and_leaves_nothing(tmp_path, sides, bad):
    with pytest.raises(UserError, match=r"^alpha 0.5: its score is (nan|inf), must be a finite number"):
        search(*sides, ALPHAS, lambda folder: bad, tmp_path / "try")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


# ---- the user's own command ----


def program(text: str) -> str:
    return shlex.join([sys.executable, "-c", text])


def test_a_command_gets_the_folder_and_its_last_line_is_the_score(tmp_path):
    score = CommandScore(program("import sys; print('loading'); print(len(sys.argv[-1]), '\\n')"))
    assert score(tmp_path) == len(str(tmp_path))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (program("import sys; print('x', file=sys.stderr); sys.exit('no GPU')"), r"ended with code 1: no GPU$"),
        (program("print('score: 3')"), r"its last line was 'score: 3', must be one number$"),
        (program(""), r"its last line was '', must be one number$"),
        ("nonesuch-program --x", r"^score command nonesuch-program --x: cannot be run: No such file"),
        ("'", r"No closing quotation"),
        (" ", r"was empty"),
        ("echo 1; echo 2 > x", r"its last line was '1; echo 2 > x"),  # no shell
    ],
)
def test_a_command_without_a_score(tmp_path, command, message):
    with pytest.raises(UserError, match=message):
        CommandScore(command)(tmp_path)


def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path):
    started = time.monotonic()
    code = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    with pytest.raises(UserError, match=r"took longer than 0.3 seconds"):
        CommandScore(program(code), 0.3)(tmp_path)
    assert time.monotonic() - started < 20  # otherwise we would wait for the pipe that `sleep` holds open
    with pytest.raises(UserError, match="timeout: was 0, must be above 0"):
        CommandScore("echo 1", 0)


# ---- the driver's own scores ----


@pytest.fixture
def dev(tmp_path):
    return str(runs.write_rows(tmp_path / "dev.jsonl", runs.make_rows(9, seed=4)))


def test_pair_scores_of_any_two_checkpoints(tmp_path, model, dev):
    """γ by the driver against transformers' logits; the reward margin is β times the difference of two γ."""
    aligned = runs.make_model(tmp_path / "1", seed=1)
    say = Reporter(quiet=True)
    gamma = PairScore(model, aligned, [dev], "gamma", None, say)
    margin = PairScore(model, aligned, [dev], "reward_margin", None, say)
    assert margin(model) == 0.0
    assert margin(aligned) == pytest.approx(0.1 * (gamma(aligned) - gamma(model)), rel=1e-4)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(aligned), runs.make_tokenizer()
    total = 0.0
    for row in runs.make_rows(9, seed=4):
        for sign, key in ((1, "chosen"), (-1, "rejected")):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor([tokenizer(row["prompt"] + row[key])["input_ids"] + [tokenizer.eos_token_id]])
            logps = loaded(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            total += sign * float(logps.detach().sum())
    assert gamma(aligned) == pytest.approx(total / 9, rel=1e-4)
    config = runs.configured(tmp_path, model, beta=0.7)
    assert PairScore(model, aligned, [dev], "reward_margin", config, say)(aligned) == pytest.approx(
        7 * margin(aligned), rel=1e-5
    )


def test_an_adapter_is_scored_on_its_base(tmp_path, model, dev):
    torch.manual_seed(2)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    wrapped.save_pretrained(tmp_path / "lora")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    scores = {}
    for name in ("lora", "merged"):
        score = PairScore(model, tmp_path / name, [dev], "gamma", None, Reporter(quiet=True))
        scores[name] = search(model, tmp_path / name, (0.5,), score, tmp_path / "try").trials
    for one, other in zip(scores["lora"], scores["merged"], strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-4)
    assert scores["lora"][0].score != pytest.approx(scores["lora"][1].score, rel=1e-2)


def test_bf16_weights_are_scored_in_bf16(tmp_path, model, dev):
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(tmp_path / "low")
    runs.make_tokenizer().save_pretrained(tmp_path / "low")
    say = Reporter(quiet=True)
    assert PairScore(model, tmp_path / "low", [dev], "gamma", None, say).config.dtype == "bfloat16"
    assert PairScore(tmp_path / "low", model, [dev], "gamma", None, say).config.dtype == "float32"


# ---- the command ----


@pytest.fixture
def main(monkeypatch, capsys):
    """`sdpo expo ARGUMENTS` in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sdpo", "expo", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        release_memory()
        return (code, *capsys.readouterr())

    return call


def test_a_given_alpha(main, tmp_path, sides):
    code, out, err = main(*sides, tmp_path / "out", "--alpha", "0.5")
    assert (code, err) == (0, "")
    assert out == f"loading torch and transformers\nα 0.5: {tmp_path / 'out'}\n"
    assert value(tmp_path / "out") == 1.5
    code, out, err = main(*sides, tmp_path / "out", "--alpha", "0.5")
    assert (code, out) == (2, "loading torch and transformers\n")
    assert err == f"error: {tmp_path / 'out'}: already exists; give a new or an empty folder\n"


def test_a_search_by_a_command(main, tmp_path, sides):
    score = tmp_path / "score.py"
    score.write_text(
        "import sys, pathlib\nb = pathlib.Path(sys.argv[-1], 'model.safetensors').read_bytes()[-4:]\n"
        "import struct\nw, = struct.unpack('<f', b)\nprint(-abs(w - 1.3))\n"
    )
    command = f"{sys.executable} {score}"
    code, out, err = main(*sides, tmp_path / "out", "--search", "0.1,0.3,0.5", "--score-command", command)
    assert (code, err) == (0, "")
    assert value(tmp_path / "out") == pytest.approx(1.3)
    assert out.splitlines()[-1] == f"α 0.3: {tmp_path / 'out'}"
    assert "| 0.3 | " in (tmp_path / "out" / "README.md").read_text()
    score.write_text("print(1)")
    code, out, err = main(*sides, tmp_path / "same", "--score-command", command, "--timeout", "60")
    assert (code, err) == (0, "")
    assert "no α above 0 scored higher" in out
    assert value(tmp_path / "same") == 1.0
    assert "unchanged" in (tmp_path / "same" / "README.md").read_text()


def test_a_search_on_pairs(main, tmp_path, model, dev):
    aligned = runs.make_model(tmp_path / "1", seed=1)
    options = ("--search", "0.2,0.4", "--data", dev, "--metric", "gamma", "--quiet")
    assert main(model, aligned, tmp_path / "out", *options) == (0, "", "")
    score = PairScore(model, aligned, [dev], "gamma", None, Reporter(quiet=True))
    best = search(model, aligned, (0.2, 0.4), score, tmp_path / "try").best
    assert score(tmp_path / "out") == best.score
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_file_of_the_configs_own_columns(main, tmp_path, model, dev):
    """With --config a file that is in it is read as it is there; without, the error says where columns go."""
    rows = [json.loads(line) for line in Path(dev).read_text().splitlines()]
    renamed = [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
    own = str(runs.write_rows(tmp_path / "own.jsonl", renamed))
    config = runs.write_settings(
        tmp_path, model, stages=[{"name": "s", "data": own, "columns": {"prompt": "question"}}]
    )
    scores = [
        PairScore(model, model, [path], "gamma", load_config(config), Reporter(quiet=True))(model)
        for path in (own, dev)
    ]
    assert scores[0] == scores[1]
    code, _, err = main(model, model, tmp_path / "out", "--search", "0.2", "--data", own)
    assert code == 2
    assert err.rstrip().endswith("; in the run.yaml of --config: columns: {prompt: question}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --alpha, or --data or --score-command to search by"),
        (["--search", "0.1"], "give --alpha, or --data or --score-command to search by"),
        (["--alpha", "0.1", "--search", "0.1"], "--search: only a search uses it"),
        (["--alpha", "0.1", "--data", "x"], "--data: only a search uses it"),
        (["--data", "x", "--score-command", "y"], "--data: a search has one score"),
        (["--score-command", "y", "--metric", "gamma"], "--metric: --score-command does not use it"),
        (["--data", "x", "--timeout", "3"], "--timeout: --data does not use it"),
        (["--data", "x", "--search", "0.1;0.2"], "--search: was '0.1;0.2', must be numbers above 0"),
        (["--data", "x", "--search", "0,0.2"], "--search: was '0,0.2', must be numbers above 0"),
        (["--data", "x", "--metric", "loss"], "--metric: was 'loss', must be one of pair_accuracy, "),
        (["--alpha", "-1"], "alpha: was -1, must be a finite number of at least 0"),
    ],
)
def test_options_that_do_not_go_together(main, tmp_path, sides, options, message):
    code, out, err = main(*sides, tmp_path / "out", *options)
    assert (code, out) == (2, "loading torch and transformers\n")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_an_output_that_is_not_empty_is_reported_before_the_search(main, tmp_path, sides, monkeypatch):
    monkeypatch.setattr(search_module, "extrapolate", lambda *args: pytest.fail("searched"))
    code, _, err = main(*sides, sides[0], "--score-command", "echo 1")
    assert code == 2
    assert "already exists" in err
