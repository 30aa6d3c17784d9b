"""The command `sdpo`: train, check, score and report. Each subcommand is a few lines over `stepwise/`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from sdpo_kernels.stepwise.common.errors import Interrupted, UserError
from sdpo_kernels.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Stepwise DPO (arXiv 2403.19270): preference training in stages, one model in memory.",
)

ConfigFile = Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The run's settings.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override, e.g. beta=0.05.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Train all stages; run it again after a crash and it goes on where it was."""
    from sdpo_kernels.stepwise.common.progress import Reporter
    from sdpo_kernels.stepwise.run import run
    from sdpo_kernels.stepwise.settings.run_file import load_config

    settings = load_config(config, overrides or [])
    try:
        run(settings, Reporter(quiet))
    except KeyboardInterrupt:  # a stage's steps listen for it themselves; elsewhere there is nothing new to save
        raise Interrupted("stopped; the same command goes on from there") from None


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Read config, data and tokenizer; say what would happen; train nothing."""
    from sdpo_kernels.stepwise.check import check_run
    from sdpo_kernels.stepwise.common.progress import Reporter
    from sdpo_kernels.stepwise.settings.run_file import load_config

    check_run(load_config(config, overrides or []), Reporter())


@app.command()
def score(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[list[str] | None, typer.Option(help="Score this model; may be given more than once.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Score on this data instead of the run's eval_data.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Reward accuracy and margins on preference data: of the run's initial and finished models, or of --model."""
    from sdpo_kernels.stepwise.score import score_run
    from sdpo_kernels.stepwise.settings.run_file import load_config

    score_run(load_config(config, overrides or []), model or [], data or [], as_json=json_output)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The output_dir of a run.")]) -> None:
    """Rebuild a run's report.html and pictures."""
    from sdpo_kernels.stepwise.report.run_report import write_report

    for path in write_report(run_dir):
        typer.echo(path)


@app.command()
def expo(
    start: Annotated[Path, typer.Argument(metavar="START", help="θ0: the model before alignment, a folder.")],
    aligned: Annotated[Path, typer.Argument(metavar="ALIGNED", help="θ1: the model after it, or its LoRA adapter.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new folder.")],
    alpha: Annotated[float | None, typer.Option(help="How far beyond ALIGNED; 0.3 to 0.5 is usual.")] = None,
    search: Annotated[str | None, typer.Option(help="Choose from these, e.g. 0.1,0.3,0.5.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Preference pairs to choose by; may be repeated.")] = None,
    metric: Annotated[str | None, typer.Option(help="Of --data: pair_accuracy, reward_margin, gamma …")] = None,
    config: Annotated[Path | None, typer.Option(help="A run.yaml: β, lengths, batches for --data.")] = None,
    score_command: Annotated[
        str | None, typer.Option(help="Choose by what this prints last; it gets the model's folder.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that --score-command may take for a model.")] = None,
    quiet: Quiet = False,
) -> None:
    """ExPO: the model θ1 + α(θ1 − θ0), further along the way from START to ALIGNED; nothing is trained."""
    from sdpo_kernels.stepwise.common.progress import Reporter
    from sdpo_kernels.stepwise.post.command import expo_command

    expo_command(
        start,
        aligned,
        output,
        alpha=alpha,
        alphas=search,
        data=data or [],
        metric=metric,
        config=config,
        score_command=score_command,
        timeout=timeout,
        reporter=Reporter(quiet),
    )


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdpo_kernels {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Entry point: mistakes of the user end in one clear line and exit code 2, a stop by signal in 130."""
    first = os.environ.get("RANK", "0") == "0"  # of the processes that a launcher has started; the others are silent
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING if first else logging.CRITICAL)
    if not first:
        warnings.simplefilter("ignore")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about fields it will rename
    warnings.filterwarnings("ignore", category=FutureWarning, module="accelerate")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks and bars are not ours; both can be set
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except UserError as error:
        _end(error, f"error: {error}", 2)
    except Interrupted as stop:
        _end(stop, str(stop), 130)


def _end(error: BaseException, message: str, code: int) -> None:
    """Say `message` (of several processes the first alone does) and exit."""
    from sdpo_kernels.stepwise.common import ranks

    if ranks.launched() == 1:
        print(message, file=sys.stderr)
        sys.exit(code)
    if ranks.says(error):
        print(message, file=sys.stderr, flush=True)
    os._exit(code)  # connections to processes that are gone may keep an ordinary exit waiting
