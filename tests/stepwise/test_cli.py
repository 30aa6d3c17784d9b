"""The command `sdpo`: exit codes, one-line errors, clean output without a terminal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdpo_kernels import cli
from sdpo_kernels.backends.describe import describe_auto
from sdpo_kernels.stepwise import run as run_module
from sdpo_kernels.version import __version__
from tests.stepwise import runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def main(monkeypatch, capsys):
    """`main()` in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sdpo", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_train_from_the_command_line(main, tmp_path, model):
    """In a real process: nothing on stderr, plain lines on stdout."""
    pytest.importorskip(
        "datasets", reason="datasets is not installed, and the command asks for the whole extra `train`"
    )
    path = runs.write_settings(tmp_path, model)
    settings = ("beta=0.3", "stages.0.epochs=2")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "sdpo_kernels", "train", str(path), *settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[:5] == [
        "loading torch and transformers",
        f"loading the tokenizer of {model}",
        "reading stage s1",
        "reading stage s2",
        "trying what training needs: model, saving, trainer, disk space",
    ]
    assert lines[5] == f"backend: {describe_auto(torch.device('cpu'), torch.float32)}"
    assert lines[6] == f"loading the model {model}"
    assert re.fullmatch(r"stage 1 of 2 s1: references  12/12  took \d+\.\ds", lines[7])
    assert any(
        re.match(r"stage 1 of 2 s1  6/6  took \d+\.\ds  run step 6/8, about \d+s left  loss ", line) for line in lines
    )
    assert any(re.fullmatch(r"stage 1 of 2 s1: done in \d+\.\ds; run step 6/8, about \d+s left", x) for x in lines)
    assert any(re.fullmatch(r"stage 2 of 2 s2: done in \d+\.\ds; run step 8/8, all steps done", x) for x in lines)
    assert lines[-1] == f"report: {tmp_path}/run/report.html"
    assert (tmp_path / "run" / "report.html").exists()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [(s["beta"], s["steps"]) for s in manifest["stages"]] == [(0.3, 6), (0.3, 2)]
    assert main("train", path, *settings, "--quiet") == (0, "", "")
    code, out, err = main("train", path, *settings)
    assert (code, err) == (0, "")
    assert out.endswith(f"\nnothing to do: all 2 stages in {tmp_path}/run are done\n")
    code, out, err = main("train", path, "--quiet")
    assert (code, out) == (2, "")
    assert "\n  beta: 0.3 -> 0.1 (the weights so far depend on it)\n" in err


def test_quiet_prints_nothing(main, tmp_path, model):
    path = runs.write_settings(tmp_path, model, sizes=(4,))
    assert main("train", path, "--quiet") == (0, "", "")
    assert (tmp_path / "run" / "stage-1-s1" / "model.safetensors").exists()


def test_warnings_are_printed_with_quiet_too(main, tmp_path, model):
    rows = runs.make_rows(4)
    runs.write_rows(tmp_path / "data1.jsonl", rows)
    runs.write_rows(tmp_path / "data2.jsonl", rows)
    code, out, err = main("train", runs.write_settings(tmp_path, model), "-q", "trainer.max_steps=1")
    assert (code, out) == (0, "")
    assert err.startswith("warning: stages 's1' and 's2' share 4 of their 4 and 4 distinct pairs")
    assert err.count("\n") == 1


def test_version(main):
    assert main("--version") == (0, f"sdpo_kernels {__version__}\n", "")


@pytest.mark.parametrize("command", [[], ["train", "--help"], ["--help"], ["-h"], ["score", "-h"]])
def test_help_names_the_commands(main, command):
    _, out, err = main(*command)
    assert ("train" in out + err) or ("RUN.YAML" in out + err)
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["train", "check", "score"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonesuch.yaml"], "error: nonesuch.yaml: no such file"),
        (["{yaml}", "betta=1"], "betta: unknown key; did you mean 'beta'? (from the override 'betta=1')"),
        (["{yaml}", "beta=-1"], "beta: was -1, must be greater than 0 (from the override 'beta=-1')"),
        (["{yaml}", "--beta", "0.05"], "--beta: no such option; settings are overridden as key=value: beta=0.05\n"),
        (["{yaml}", "--beta=0.05"], "--beta=0.05: no such option; settings are overridden as key=value: beta=0.05\n"),
        (["{yaml}", "beta"], "error: override 'beta': must be key=value"),
        (["{yaml}", "eval_data=nonesuch.jsonl"], "nonesuch.jsonl: no such file"),
        (["{yaml}", "trainer.learning_rate=fast"], "trainer.learning_rate: was 'fast', must be a valid number"),
    ],
)
def test_user_errors_are_one_line_on_stderr_and_exit_code_2(main, tmp_path, model, command, arguments, message):
    path = runs.write_settings(tmp_path, model)
    evaluation = runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(2))
    given = [a.format(yaml=path) for a in arguments]
    if command == "score" and not any(a.startswith("eval_data") for a in given):
        given.append(f"eval_data={evaluation}")
    code, out, err = main(command, *given)
    assert code == 2
    assert message in err
    # an option that does not exist is reported before anything is loaded
    begun = {line.split()[0] for line in out.splitlines()}
    assert begun <= (set() if "no such option" in message else {"loading", "reading"})
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "80"], "error: --memory: was '80', must be a number above 0 with a unit (MiB, GiB, "),
        (["--gpus", "0"], "error: --gpus: was 0, must be a number of GPUs, at least 1\n"),
    ],
)
def test_gpus_that_cannot_be_are_reported_before_anything_is_loaded(main, tmp_path, model, arguments, message):
    code, out, err = main("check", runs.write_settings(tmp_path, model), *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)


def test_a_bad_row_names_file_and_line(main, tmp_path, model):
    (tmp_path / "data1.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    code, _, err = main("check", runs.write_settings(tmp_path, model))
    assert code == 2
    assert err.startswith(f"error: {tmp_path}/data1.jsonl:2: broken JSON")


def test_check_and_score_and_report(main, tmp_path, model, pictures):
    evaluation = runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(3))
    path = runs.write_settings(tmp_path, model, sizes=(4,), eval_data=str(evaluation))
    code, out, err = main("check", path, "--gpus", 2, "--memory", "80GiB")
    assert (code, err) == (0, "")
    assert "It fits: " in out
    assert "of 80.0 GiB." in out
    assert "(new)" in out
    assert not (tmp_path / "run").exists()
    assert main("train", path, "-q")[0] == 0
    assert "1 of 1 stages done" in main("check", path)[1]
    code, out, err = main("score", path, "--json", "--model", model)
    assert (code, err) == (0, "")
    assert json.loads(out)[str(model)]["pairs"] == 3
    for page in (tmp_path / "run").glob("*.html"):
        page.unlink()
    code, out, err = main("report", tmp_path / "run")
    assert (code, err) == (0, "")
    assert str(tmp_path / "run" / "report.html") in out.splitlines()
    code, out, err = main("report", tmp_path)
    assert (code, out) == (2, "")
    assert "has no manifest.json" in err


def test_a_stop_outside_of_training_says_how_to_resume(main, tmp_path, model, monkeypatch):
    def stop(config, template_time, reporter):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "prepare", stop)
    code, out, err = main("train", runs.write_settings(tmp_path, model))
    assert (code, out) == (130, "loading torch and transformers\n")
    assert err == "stopped; run the same command again to resume\n"


def test_the_command_itself_imports_no_transformers():
    """Help and version must not wait for the import."""
    code = "import sys, sdpo_kernels.cli; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"
